"""Build the sdist and the wheel, install the wheel without extras into a new environment, and test it there.

``make release-check`` runs this script. The script fails if the build or ``twine check`` gives a warning, if the sdist
or the wheel has 5 MB or more, or if a test in the new environment fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_BYTES = 5_000_000

SCORING = """
import focuslens as fl

model = fl.FocusModel.demo(device="cpu")
scores = fl.contextual_scores(model, fl.load_synthetic(3), max_new_tokens=8)
assert len(scores.top_heads(3)) == 3
"""
"""Code that scores the embedded model. The code must work without extras."""

MISSING = {
    "viz": "import focuslens as fl; fl.viz",
    "rouge": "from focuslens.scores.rouge import rouge_1_recall; rouge_1_recall('a', 'a')",
    "ray": "import focuslens as fl; fl.RayPool('demo')",
}
"""Code that needs an extra, by the name of the extra. The error without the extra must contain this name."""

COMMANDS = {
    "viz": ["heads", "--samples", "1", "--out", "heads"],
    "viz,rouge": ["paper", "--model", "demo", "--out", "paper"],
}
"""Commands that need extras, by the names of the extras. The error without extras must contain one of these names."""


def build(folder: Path) -> list[Path]:
    """Build the sdist and the wheel, and check them for warnings, size and metadata."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    warned = [line for line in output.splitlines() if "warning" in line.lower() and "Location 'file:" not in line]
    if done.returncode or warned:
        raise SystemExit("\n".join(warned) or output)
    files = sorted(folder.iterdir())
    for file in files:
        size = file.stat().st_size
        print(f"{file.name}: {size:,} bytes")
        if size >= MOST_BYTES:
            raise SystemExit(f"{file.name} has {size:,} bytes; a distribution must have less than {MOST_BYTES:,}")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
    return files


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel with pinned dependencies into a new environment, and return the environment's ``bin``."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    pinned = ["-c", str(ROOT / "constraints.txt")]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([str(programs / "python"), "-m", "pip", "install", *quiet, *pinned, str(wheel)], check=True)
    return programs


def try_out(programs: Path, folder: Path) -> None:
    """Run the ``focuslens`` command, score the embedded model, and check the errors for missing extras."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    python, focuslens = str(programs / "python"), str(programs / "focuslens")
    for command in ([focuslens, "--version"], [focuslens, "--help"], [python, "-m", "focuslens", "--version"]):
        done = run(*command)
        print(f"$ {' '.join([Path(command[0]).name, *command[1:]])}: {(done.stdout.splitlines() or [''])[0]}")
        if done.returncode:
            raise SystemExit(done.stderr)
    done = run(python, "-c", SCORING)
    print(f"scores of the embedded model: {'passed' if done.returncode == 0 else done.stderr}")
    if done.returncode:
        raise SystemExit(1)
    for extra, code in MISSING.items():
        _require_named(extra, run(python, "-c", code))
    for extras, command in COMMANDS.items():
        _require_named(extras, run(focuslens, *command))


def _require_named(extras: str, done: subprocess.CompletedProcess[str]) -> None:
    """Exit with an error unless the process failed with a message that names one of the extras."""
    last = (done.stderr.strip().splitlines() or ["no error"])[-1]
    print(f"without {extras}: {last}")
    if done.returncode == 0 or not any(f"focuslens[{extra}]" in last for extra in extras.split(",")):
        raise SystemExit(f"the error does not say how to install {extras}:\n{done.stderr}")


def main() -> None:
    """Build, install and test the distributions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, help="folder to keep the distributions in; default: none are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        wheel = next(file for file in build(options.dist or Path(work) / "dist") if file.suffix == ".whl")
        programs = install(wheel, Path(work) / "environment")
        try_out(programs, Path(work))


if __name__ == "__main__":
    main()

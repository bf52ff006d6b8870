"""Build the distributions, install the wheel into an empty environment without extras, and try it there.

Run by ``make release-check``. It fails on a warning of the build or of ``twine check``, a distribution of 5 MB or more,
and anything that does not work in the environment.
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
"""Scores of the embedded model, without any extra."""

MISSING = {
    "viz": "import focuslens as fl; fl.viz",
    "rouge": "from focuslens.scores.rouge import rouge_1_recall; rouge_1_recall('a', 'a')",
    "ray": "import focuslens as fl; fl.RayPool('demo')",
}
"""Code that needs an extra, by the extra that its error has to name."""

COMMANDS = {
    "viz": ["heads", "--samples", "1", "--out", "heads"],
    "viz,rouge": ["paper", "--model", "demo", "--out", "paper"],
}
"""Commands that need an extra, by the extras of which their error has to name one."""


def build(folder: Path) -> list[Path]:
    """The sdist and the wheel, checked for warnings, size and metadata."""
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
            raise SystemExit(f"{file.name} has {size:,} bytes; a distribution is to have less than {MOST_BYTES:,}")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
    return files


def install(wheel: Path, folder: Path) -> Path:
    """The folder of programs of a new environment that holds the wheel, at the pinned versions."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    pinned = ["-c", str(ROOT / "constraints.txt")]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([str(programs / "python"), "-m", "pip", "install", *quiet, *pinned, str(wheel)], check=True)
    return programs


def try_out(programs: Path, folder: Path) -> None:
    """Run the command, score the embedded model, and compare the errors of missing extras."""

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
    """Refuse an error that names none of the extras, or no error at all."""
    last = (done.stderr.strip().splitlines() or ["no error"])[-1]
    print(f"without {extras}: {last}")
    if done.returncode == 0 or not any(f"focuslens[{extra}]" in last for extra in extras.split(",")):
        raise SystemExit(f"the error does not say how to install {extras}:\n{done.stderr}")


def main() -> None:
    """Build, install and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, help="folder to keep the distributions in; default: none are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        wheel = next(file for file in build(options.dist or Path(work) / "dist") if file.suffix == ".whl")
        programs = install(wheel, Path(work) / "environment")
        try_out(programs, Path(work))


if __name__ == "__main__":
    main()

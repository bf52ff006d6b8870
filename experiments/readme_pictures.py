"""Draws the pictures of the README into ``docs``, from a finished run of the demo; needs chromium.

focuslens demo --out runs/demo
python experiments/readme_pictures.py --run runs/demo --docs docs
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import focuslens as fl
from focuslens.interventions import intervention_from
from focuslens.util.files import write_atomically
from focuslens.viz import AttentionView, compare_view
from focuslens.viz.run_report.samples import reopen_samples

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEADS = 4


def main() -> None:
    """Write ``split_softmax.png``, ``before_after.png`` and ``report.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="what focuslens demo wrote")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the pictures go")
    args = parser.parse_args()
    figure = args.run / "report_files" / "split_softmax.png"
    if not figure.is_file():
        raise SystemExit(f"there is no {figure}; run this first: focuslens demo --out {args.run}")
    write_atomically(args.docs / "split_softmax.png", figure.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        page = changed_sample(args.run / "split_softmax.jsonl").save(Path(folder) / "view.html")
        screenshot(page, args.docs / "before_after.png", 1100, 1010)
    screenshot(args.run / "report.html", args.docs / "report.png", 900, 1130)
    print(f"wrote split_softmax.png, before_after.png and report.png to {args.docs}")


def changed_sample(records: Path) -> AttentionView:
    """The first question that the best setting put right, before and after, in the head it acts on first."""
    sweep, model = fl.load_sweep(records), fl.FocusModel.demo()
    best = fl.best_setting(sweep, [one for one in sweep.settings if one.parameters.get("heads") == "contextual"])
    pairs = zip(sweep["baseline"].sample_ids, sweep["baseline"].correct, sweep[best.name].correct, strict=True)
    chosen = next((name for name, before, after in pairs if after and not before), None)
    if chosen is None:
        raise SystemExit(f"{records}: {best.name} put no answer right, so there is none to show")
    sample = next(one for one in reopen_samples(sweep.header) if one.id == chosen)
    described = next(one for one in sweep.header["settings"] if one["name"] == best.name)["interventions"]
    applied = [intervention_from(one) for one in described]
    before, after = (
        fl.response_attention(
            model,
            sample.prompt("long"),
            applied[0].heads[:HEADS],
            interventions=one,
            max_new_tokens=sweep.header["max_new_tokens"],
            name=name,
        )
        for name, one in (("as it is", ()), (f"split-softmax, tau = {best.parameters['tau']:g}", applied))
    )
    return compare_view(before, after, title=sample.question, head=0)


def screenshot(page: Path, png: Path, width: int, height: int) -> None:
    """A page in a window of some size, without a network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"found none of {', '.join(BROWSERS)}; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "page.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
        options += ["--force-device-scale-factor=1.5", "--host-resolver-rules=MAP * ~NOTFOUND"]
        options += [f"--window-size={width},{height}", "--virtual-time-budget=5000", f"--screenshot={taken}"]
        done = subprocess.run([browser, *options, page.resolve().as_uri()], capture_output=True, text=True, check=False)
        if not taken.is_file():
            raise SystemExit(f"{browser} took no picture: {done.stderr[-500:]}")
        write_atomically(png, taken.read_bytes())


if __name__ == "__main__":
    main()

"""Make the README's pictures in ``docs`` from a finished run of the demo. The script needs Chromium or Chrome.

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
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of focuslens demo")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the pictures")
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
    """View of the first question that the best setting answers correctly and the baseline answers incorrectly.

    The view compares the attention without and with the setting, and initially shows the setting's first head.
    """
    sweep, model = fl.load_sweep(records), fl.FocusModel.demo()
    contextual = [setting for setting in sweep.settings if setting.parameters.get("heads") == "contextual"]
    best = fl.best_setting(sweep, contextual)
    pairs = zip(sweep["baseline"].sample_ids, sweep["baseline"].correct, sweep[best.name].correct, strict=True)
    chosen = next((name for name, before, after in pairs if after and not before), None)
    if chosen is None:
        raise SystemExit(f"{records}: {best.name} corrects no answer, so there is none to show")
    sample = next(sample for sample in reopen_samples(sweep.header) if sample.id == chosen)
    setting = next(setting for setting in sweep.header["settings"] if setting["name"] == best.name)
    applied = [intervention_from(description) for description in setting["interventions"]]
    before, after = (
        fl.response_attention(
            model,
            sample.prompt("long"),
            (applied[0].heads or ())[:HEADS],
            interventions=interventions,
            max_new_tokens=sweep.header["max_new_tokens"],
            name=name,
        )
        for name, interventions in (("as it is", ()), (f"split-softmax, tau = {best.parameters['tau']:g}", applied))
    )
    return compare_view(before, after, title=sample.question, head=0)


def screenshot(page: Path, png: Path, width: int, height: int) -> None:
    """Write a screenshot of a page in a browser window of ``width`` by ``height`` pixels, without network access."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"found none of {', '.join(BROWSERS)}; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
        options += ["--force-device-scale-factor=1.5", "--host-resolver-rules=MAP * ~NOTFOUND"]
        options += [f"--window-size={width},{height}", "--virtual-time-budget=5000", f"--screenshot={picture}"]
        done = subprocess.run([browser, *options, page.resolve().as_uri()], capture_output=True, text=True, check=False)
        if not picture.is_file():
            raise SystemExit(f"{browser} took no picture: {done.stderr[-500:]}")
        write_atomically(png, picture.read_bytes())


if __name__ == "__main__":
    main()

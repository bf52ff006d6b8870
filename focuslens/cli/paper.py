"""``focuslens paper``: the tables and figures of the paper for one model, apart from HELMET's tables."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from focuslens.cli import cluster, options, paths
from focuslens.cli.command import Command
from focuslens.cli.output import document

__all__ = ["COMMAND"]

_LOG = logging.getLogger(__name__)


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_file(
        parser,
        "--model",
        check=paths.settings_file,
        default="demo",
        help="name of settings in the package (default 'demo'), or a YAML file of settings",
    )
    options.add_file(
        parser,
        "--data",
        check=paths.data_file,
        type=options.path,
        help="path of the lost-in-the-middle file, if it differs from the settings' name",
    )
    options.add_directory(
        parser, "--haystack", type=options.path, help="directory of essays and needles.jsonl, for retrieval heads"
    )
    options.add_out_directory(
        parser, type=options.path, help="directory for results (default runs/paper/NAME); a killed run resumes there"
    )
    parser.add_argument("--only", action="append", default=[], metavar="ARTEFACT", help="one artefact; repeatable")
    cluster.add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the artefacts (tables and figures) that are not finished yet, and ``index.html``."""
    import focuslens.viz  # noqa: F401  # pyright: ignore[reportUnusedImport]  (a missing library fails before any work)
    from focuslens.scores.rouge import rouge_1_recall
    from focuslens.studies.paper.run import reproduce, results_folder
    from focuslens.studies.paper.settings import find_settings, load_settings
    from focuslens.studies.paper.study import Study

    settings = load_settings(find_settings(args.model))
    out = args.out or paths.default_out(results_folder(settings.name))
    if not args.only or "retrieval" in args.only:
        rouge_1_recall("a", "a")  # raises here, not after hours, if rouge-score is missing
    with cluster.open_pool(args, settings.model, settings.model_options) as pool:
        study = Study(settings, out, args.data, args.haystack, pool=pool)
        shown = reproduce(study, args.only, say=_LOG.info)
    print(f"\n{len(shown)} artefacts: {out / 'index.html'}")
    folders = [out / artefact.key for artefact in shown]
    artefacts = [json.loads((folder / "artefact.json").read_text()) for folder in folders]
    content = {"command": "paper", "settings": settings.name, "artefacts": artefacts}
    return document(content, out / "index.html", *folders)


COMMAND = Command(
    name="paper",
    help="every table and figure of the paper, for one model",
    description="Make Figures 2 to 9 and Tables 1 and 3 of arXiv 2503.23306 and further analyses, from one YAML file\n"
    "per model, with all of them on index.html. A killed run resumes. Finished artefacts are not made again.",
    example="focuslens paper --model demo --out runs/paper/demo",
    add_options=_add_options,
    run=run,
    resumes="always",
)

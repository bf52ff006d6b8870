"""``focuslens paper``: every table and figure of the paper, for one model."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from focuslens.cli import cluster, output
from focuslens.cli.options import Parser

__all__ = ["add_options", "artefact_main", "run"]

_LOG = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser, *, only: bool = True) -> None:
    """The options of the command; those of a script that makes one artefact lack ``--only``."""
    parser.add_argument(
        "--model", default="demo", help="settings: 'demo' (default), another name that ships, or a YAML file"
    )
    parser.add_argument("--data", type=Path, help="the lost-in-the-middle file, where it is not at the settings' name")
    parser.add_argument("--haystack", type=Path, help="directory of essays and needles.jsonl, for retrieval heads")
    parser.add_argument("--out", type=Path, help="directory for results (default runs/paper/NAME); goes on from there")
    if only:
        parser.add_argument("--only", action="append", default=[], metavar="ARTEFACT", help="one artefact; repeatable")
    cluster.add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the artefacts that are not there yet, and ``index.html``."""
    from focuslens.scores.rouge import rouge_1_recall
    from focuslens.studies.paper.run import reproduce, results_folder
    from focuslens.studies.paper.settings import find_settings, load_settings
    from focuslens.studies.paper.study import Study

    settings = load_settings(find_settings(args.model))
    out = args.out or results_folder(settings.name)
    if not args.only or "retrieval" in args.only:
        rouge_1_recall("a", "a")  # what it lacks is better known now than after the work
    with cluster.open_pool(args, settings.model, settings.model_options) as pool:
        study = Study(settings, out, args.data, args.haystack, pool=pool)
        shown = reproduce(study, args.only, say=_LOG.info)
    print(f"\n{len(shown)} artefacts: {out / 'index.html'}")
    folders = [out / one.key for one in shown]
    artefacts = [json.loads((folder / "artefact.json").read_text()) for folder in folders]
    content = {"command": "paper", "settings": settings.name, "artefacts": artefacts}
    return output.document(content, out / "index.html", *folders)


def artefact_main(key: str, about: str | None, arguments: list[str] | None = None) -> None:
    """What the scripts in ``experiments/`` run: one artefact, under the options of ``focuslens paper``."""
    parser = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, only=False)
    output.add_options(parser)
    output.carry_out(argparse.Namespace(**{**vars(parser.parse_args(arguments)), "only": [key]}), run)

"""``focuslens published``: statistics of the paper authors' published directions. No model weights are needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from focuslens.cli import options
from focuslens.cli.command import Command
from focuslens.cli.figures import note_figures
from focuslens.cli.output import document

__all__ = ["COMMAND", "run"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_directory(
        parser, "directory", metavar="DIR", help="folder with head_features and contextual_heads_scores_full_seq"
    )
    options.add_out_directory(parser, help="directory for tables, figures and index.html; default: print only")
    parser.add_argument(
        "--top",
        type=options.positive,
        default=20,
        help="number of heads that count as contextual (default %(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the statistics and, with ``--out``, write ``published.json``, CSV tables, figures and ``index.html``."""
    note_figures(args.out)
    from focuslens.cli.published_survey import Survey

    survey = Survey.of(args.directory, args.top)
    survey.print()
    if args.out is None:
        return document(survey.result())
    return document(survey.result(), *survey.write(Path(args.out)))


COMMAND = Command(
    name="published",
    help="look into the directions that the paper's authors publish",
    description="Show norms, rotary frequencies and head rankings of the authors' files, model by model. The models'\n"
    "weights are not needed.",
    example="focuslens published focus_direction --out runs/published",
    add_options=_add_options,
    run=run,
)

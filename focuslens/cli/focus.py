"""``focuslens focus``: self-focus and the methods of others, side by side on the same questions."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli import options, paths
from focuslens.cli.command import Command
from focuslens.cli.common import print_table
from focuslens.cli.output import document

if TYPE_CHECKING:
    from focuslens.studies.paper.settings import PaperSettings

__all__ = ["COMMAND"]

_LOG = logging.getLogger(__name__)


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_file(
        parser,
        "--model",
        check=paths.settings_file,
        default="demo",
        help="name of settings in the package (default 'demo'), a YAML file of settings, or any model",
    )
    options.add_file(
        parser,
        "--data",
        check=paths.data_file,
        type=options.path,
        help="path of a lost-in-the-middle file; needed for a model without settings in the package",
    )
    new = parser.add_argument_group("sizes, for a model without settings")
    new.add_argument("--documents", type=options.positive, default=10, help="documents per prompt (default 10)")
    new.add_argument("--distractors", choices=("random", "bm25"), default="random", help="for an oracle file")
    new.add_argument("--train", type=options.positive, default=100, help="questions that choose heads (default 100)")
    new.add_argument("--validation", type=options.positive, default=60, help="questions that choose settings (60)")
    new.add_argument("--test", type=options.positive, default=200, help="questions that are reported (default 200)")
    new.add_argument("--max-new-tokens", type=options.positive, default=100, help="longest response (default 100)")
    options.add_out_directory(
        parser, type=options.path, help="directory for results (default runs/paper/NAME); a killed run resumes there"
    )


def _settings(args: argparse.Namespace) -> PaperSettings:
    """Settings by name or file, or made from the options for any other model.

    Raises:
        ValueError: If a model without settings has no data.
    """
    from focuslens.studies.paper.settings import DataSettings, PaperSettings, find_settings, load_settings

    for name in (f"{args.model}-focus", args.model):
        try:
            return load_settings(find_settings(name))
        except FileNotFoundError:
            if Path(name).suffix in (".yaml", ".yml"):
                raise
    if args.data is None:
        raise ValueError(
            f"no settings in the package are called {args.model!r}; for any other model, give questions with --data, "
            "such as --data nq-open-oracle.jsonl.gz"
        )
    middle = 1 + (args.documents - 1) // 2
    return PaperSettings(
        Path(args.model).name,
        args.model,
        data=DataSettings(
            args.data.name,
            args.documents,
            tuple(sorted({1, middle, args.documents})),
            every_position=False,
            train=args.train,
            validation=args.validation,
            test=args.test,
            distractors=args.distractors,
        ),
        max_new_tokens=args.max_new_tokens,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Choose a setting of each method on validation questions, and print the table of test questions."""
    import pandas as pd

    import focuslens.viz  # noqa: F401  # pyright: ignore[reportUnusedImport]  (a missing library fails before any work)
    from focuslens.studies.paper.run import reproduce, results_folder
    from focuslens.studies.paper.study import Study

    settings = _settings(args)
    out = args.out or paths.default_out(results_folder(settings.name))
    study = Study(settings, out, args.data)
    (artefact,) = (one for one in reproduce(study, ["focus"], say=_LOG.info) if one.key == "focus")
    for table in artefact.tables:
        print(f"\n{table.caption}\n")
        print_table(pd.DataFrame(table.rows, columns=pd.Index(table.columns)))
    folder = out / "focus"
    content = {"command": "focus", "settings": settings.name, **json.loads((folder / "artefact.json").read_text())}
    return document(content, out / "index.html", folder)


COMMAND = Command(
    name="focus",
    help="self-focus and other methods without a label, on one table",
    description="Compare ways to a model that reads the relevant document without being told which it is: self-focus\n"
    "(heads choose the document), methods of others, focus directions, and with the label for comparison.\n"
    "Validation questions choose the settings, test questions are reported. A killed run resumes.",
    example="focuslens focus --model smollm2-135m-instruct --data nq-open-oracle.jsonl.gz",
    add_options=_add_options,
    run=run,
    resumes="always",
)

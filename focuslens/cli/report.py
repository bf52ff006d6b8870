"""``focuslens report``: one offline HTML page with the results of a run."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from focuslens.cli import options, paths
from focuslens.cli.command import Command
from focuslens.cli.output import document

__all__ = ["COMMAND"]

_LOG = logging.getLogger(__name__)


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_directory(
        parser,
        "directory",
        metavar="RUN_DIR",
        check=None,
        type=options.path,
        help="the --out of a command, or a folder of several of them",
    )
    options.add_file(
        parser,
        "--out",
        check=paths.output_file,
        type=options.path,
        help="the page to write (default RUN_DIR/report.html)",
    )
    parser.add_argument("--title", help="heading of the page; default: the folder's name and the model's")
    parser.add_argument(
        "--views",
        type=options.count,
        default=2,
        help="number of samples to show per sweep and direction of change (default 2; 0 for none)",
    )
    parser.add_argument("--model", help="name or directory of the run's model, if it differs from that in its files")
    options.add_file(
        parser, "--data", type=options.path, help="path of the run's data file, if it differs from its name"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is a GPU")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the page, and print which parts are missing from the page."""
    if not args.directory.is_dir():
        raise FileNotFoundError(f"there is no folder {args.directory}; name the --out of a command that has run")
    if args.out is None:
        paths.default_out(args.directory / "report.html", paths.output_file)
    from focuslens.viz.run_report import Sources, run_facts, write_run_report

    sources = Sources(None, args.model, args.device, args.data, args.views)
    page, missing = write_run_report(args.directory, args.out, sources=sources, title=args.title, log=_LOG.info)
    for text in missing:
        print(f"left out: {text}")
    print(f"wrote {page}")
    facts = run_facts(args.directory)
    return document({"command": args.command, "run": str(args.directory), **facts, "left_out": missing}, page)


COMMAND = Command(
    name="report",
    help="a run's results on one offline page",
    description="Gather a command's files into one HTML page that needs no network: settings, findings with their\n"
    "intervals, figures and their data, tables that sort, and attention before and after for samples that became\n"
    "right or wrong. The page names what the files lack.",
    example="focuslens report runs/demo",
    add_options=_add_options,
    run=run,
)

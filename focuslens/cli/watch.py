"""``focuslens watch``: the report of a run that is still going on, in a browser."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

from focuslens.cli import options
from focuslens.cli.command import Command
from focuslens.cli.output import document

__all__ = ["COMMAND"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_directory(
        parser,
        "directory",
        metavar="RUN_DIR",
        check=None,
        type=options.path,
        help="the --out of a command that runs, will run or has run, or a folder of several of them",
    )
    parser.add_argument(
        "--port", type=options.count, help="port on this machine; default: 8765 if it is free, else any; 0 for any"
    )
    parser.add_argument("--no-browser", action="store_true", help="open no browser, and only print the address")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the report until a keyboard interrupt."""
    folder: Path = args.directory
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name the --out of a command")
    if args.port is not None and args.port > 65535:
        raise ValueError(f"--port {args.port}: ports go up to 65535")
    from focuslens.viz.run_report.live import LiveReport
    from focuslens.viz.run_report.server import open_server

    with (
        tempfile.TemporaryDirectory(prefix="focuslens-watch-") as work,
        open_server(LiveReport(folder, Path(work)), args.port) as server,
    ):
        print(f"{server.url} shows the report of {folder} as it grows; Ctrl-C ends it", flush=True)
        if not args.no_browser and _has_display():
            webbrowser.open(server.url)
        try:
            server.watch()
        except KeyboardInterrupt:
            print("\nended")
        return document({"command": args.command, "run": str(folder), "url": server.url})


def _has_display() -> bool:
    """Whether a browser would have a window. Otherwise, one could open in this terminal."""
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


COMMAND = Command(
    name="watch",
    help="a growing report in the browser, while a command runs",
    description="Serve the report of a run's folder on 127.0.0.1, build it again when result files change, and show\n"
    "the progress of unfinished runs. No model is loaded, and nothing is written to the folder.",
    example="focuslens watch runs/demo",
    add_options=_add_options,
    run=run,
)

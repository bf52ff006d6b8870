"""Copy the results of ``focuslens paper`` into a folder that can be published: no questions, documents or responses.

Kept are, per artefact, ``artefact.json`` with its findings and tables; per sweep, which samples were right under each
setting; and the relevant score of every head for each scored prompt. The README of the folder says which command made
them. With ``--assets``, the ranking and the directions go into the package too, where ``fl.load_ranking`` and
``FocusDirections.load`` find them by the name of the run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from focuslens.studies.paper.chunks import Measured, read_chunks
from focuslens.studies.paper.run import ARTEFACTS
from focuslens.util.record_file import read_records

_UNPUBLISHED = ("response", "finished")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of focuslens paper")
    parser.add_argument("--out", type=Path, required=True, help="folder of the published files")
    parser.add_argument("--only", choices=ARTEFACTS, help="one artefact, without scores and rankings")
    parser.add_argument("--assets", type=Path, help="the package's folder of assets, focuslens/assets")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for key in ARTEFACTS if args.only is None else [args.only]:
        if (artefact := args.run / key / "artefact.json").is_file():
            publish_artefact(artefact, args.out)
    for records in sorted(args.run.glob(f"{args.only or '*'}/*.jsonl")):
        publish_sweep(records, args.out / f"{records.parent.name}-{records.stem}.jsonl.gz")
    if args.only is not None:
        return
    publish_scores(args.run / "measured", args.out / "relevant_scores.safetensors")
    if (ranking := args.run / "ranking.json").is_file():
        (args.out / "ranking.json").write_text(compact(ranking))
        if args.assets is not None:
            publish_assets(args.run, args.out.name, args.assets)


def publish_assets(run: Path, name: str, assets: Path) -> None:
    """Copy the ranking, and the directions of both sites; those at the rotary site have the name of the run."""
    (assets / "rankings").mkdir(exist_ok=True)
    (assets / "rankings" / f"{name}.json").write_text(compact(run / "ranking.json"))
    for site in ("rotary", "projection"):
        source = run / "directions" / site
        if not (source / "made_of.json").is_file():  # training has not ended
            continue
        target = assets / "directions" / (name if site == "rotary" else f"{name}-{site}")
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.iterdir()):
            if file.name != "made_of.json":
                shutil.copyfile(file, target / file.name)


def compact(ranking: Path) -> str:
    """A ranking file with one line for each entry."""
    entries = json.loads(ranking.read_text()).items()
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in entries) + "\n}\n"


def publish_artefact(path: Path, out: Path) -> None:
    (out / f"{path.parent.name}.json").write_text(json.dumps(json.loads(path.read_text()), indent=1) + "\n")


def publish_sweep(path: Path, out: Path) -> None:
    """Records of a sweep without responses. The bytes depend on the records alone."""
    header, records = read_records(path)
    lines = [json.dumps({"header": header}, sort_keys=True)]
    for record in sorted(records, key=lambda record: str(record["id"])):
        results = {name: without_texts(result) for name, result in record["results"].items()}
        lines.append(json.dumps({**record, "results": results}, sort_keys=True))
    with out.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        packed.write(("\n".join(lines) + "\n").encode())


def without_texts(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in _UNPUBLISHED} | {"response": ""}


def publish_scores(measured: Path, out: Path) -> None:
    """Relevant scores ``[sample layer head]`` of the unchanged model on long prompts, with the samples' ids, by part.

    Scores under an intervention are in folders of the same kind, of fewer samples.
    """
    largest: dict[str, Measured] = {}
    for folder in sorted(measured.glob("*-long-*")):
        part, chunks = folder.name.partition("-long-")[0], read_chunks(folder)
        if part not in largest or len(chunks.about["sample_ids"]) > len(largest[part].about["sample_ids"]):
            largest[part] = chunks
    if not largest:
        return
    about = {
        part: {name: list(chunks.about[name]) for name in ("sample_ids", "correct")} for part, chunks in largest.items()
    }
    tensors = {part: chunks.tensors["relevant"].contiguous() for part, chunks in largest.items()}
    save_file(tensors, out, metadata={"about": json.dumps(about, sort_keys=True)})


if __name__ == "__main__":
    main()

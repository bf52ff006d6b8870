"""``focuslens published``: what the paper's authors publish of their models, without any model's weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from focuslens.cli.common import print_table, require_figures
from focuslens.cli.output import document
from focuslens.directions.published import (
    PublishedModel,
    compare_published,
    depth_profile,
    frequency_profile,
    head_table,
    initial_norm,
    load_published,
    summarize_published,
)
from focuslens.util.files import versions, write_atomically, write_json

__all__ = ["run"]

_SEED = 0
_BINS = 10


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and, with ``--out``, write ``published.json``, a CSV of each table, the figures and ``index.html``."""
    require_figures(args)
    models = load_published(args.directory)
    summaries = [summarize_published(model, args.top) for model in models]
    pairs = compare_published(models, args.top, _BINS, seed=_SEED)
    for model, row in zip(models, summaries, strict=True):
        _print_summary(row)
        print_table(_top_heads(model, args.top))
    if len(models) > 1:
        print(f"\nThe top {args.top} heads of every two models")
        print_table(_readable(pairs, models))
    result = _result(args.top, models, summaries, pairs)
    if args.out is None:
        return document(result)
    out, tables = Path(args.out), _tables(models, summaries, pairs, args.top)
    for name, frame in tables.items():
        write_atomically(out / f"{name}.csv", frame.to_csv(index=False).encode())
    figures = _draw(out, models, tables, args.top)
    write_json(out / "published.json", result)
    _write_index(out / "index.html", models, summaries, pairs, args.top, figures)
    print(f"\nwrote {out / 'index.html'}, published.json, {len(tables)} tables and {len(figures)} figures")
    files = [out / "published.json", out / "index.html", *(out / f"{name}.csv" for name in tables)]
    return document(result, *files, *(path for _, path in figures))


def _result(
    top: int, models: Sequence[PublishedModel], summaries: Sequence[dict[str, Any]], pairs: pd.DataFrame
) -> dict[str, Any]:
    return {
        "command": "published",
        "top": top,
        "depth_bins": _BINS,
        "seed": _SEED,
        "models": list(summaries),
        "pairs": [
            {name: None if pd.isna(value) else value for name, value in row.items()}
            for row in pairs.to_dict(orient="records")
        ],
        "sources": {model.name: dict(model.sources) for model in models},
        "versions": versions(),
    }


def _print_summary(row: dict[str, Any]) -> None:
    print(
        f"\n{row['model']}: {row['n_layers']} layers of {row['n_heads']} heads, d_head {row['d_head']}\n"
        f"  top {row['top']} heads: layers {row['first_layer']} to {row['last_layer']}\n"
        f"  norms: least, median, most; initial noise {row['initial_norm']:.2f}"
    )
    for name, of in (("top", f"top {row['top']}"), ("all", "all heads")):
        print(f"    {of:10} d_Q {_three(row, 'query', name, '.1f')}    d_K {_three(row, 'key', name, '.2f')}")
    print("  energy of d_Q by quarters of the rotary frequencies, fastest first")
    for name, of in (("top", f"top {row['top']}"), ("all", "all heads")):
        print(f"    {of:10} " + "  ".join(f"{row[f'quarter_{i}_{name}']:6.1%}" for i in range(1, 5)))
    pair = f"pair {row['peak_pair_top']} of {row['d_head'] // 2}, counted from 0"
    print(f"  most in one pair, top {row['top']}: {row['peak_share_top']:.1%}, {pair}\n")


def _top_heads(model: PublishedModel, top: int) -> pd.DataFrame:
    """Norms of the best heads' directions, plain and in units of the noise that training starts from."""
    table, noise = head_table(model).head(top), initial_norm(model.directions.d_head)
    frame = table[["rank", "layer", "head"]].astype("int64")
    for name, part in (("d_Q", "query_norm"), ("d_K", "key_norm")):
        frame[name], frame[f"{name} / noise"] = table[part], table[part] / noise
    return frame


def _three(row: dict[str, Any], part: str, name: str, form: str) -> str:
    return " ".join(format(row[f"{part}_norm_{name}_{of}"], form) for of in ("min", "median", "max"))


def _readable(pairs: pd.DataFrame, models: Sequence[PublishedModel]) -> pd.DataFrame:
    labels = {model.name: model.label for model in models}
    return pairs.assign(first=pairs["first"].map(labels), second=pairs["second"].map(labels))


def _tables(
    models: Sequence[PublishedModel], summaries: Sequence[dict[str, Any]], pairs: pd.DataFrame, top: int
) -> dict[str, pd.DataFrame]:
    heads, frequencies, depths = ([] for _ in range(3))
    for model in models:
        heads.append(head_table(model).assign(model=model.name))
        frequencies.append(frequency_profile(model, top).assign(model=model.name))
        profile = depth_profile(model.top(top), model.n_layers, _BINS)
        depths.append(pd.DataFrame({"bin": range(_BINS), "share": profile}).assign(model=model.name))
    sources = [(model.name, *source) for model in models for source in model.sources.items()]
    return {
        "models": pd.DataFrame(summaries),
        "heads": _joined(heads),
        "frequency": _joined(frequencies),
        "depth": _joined(depths),
        "pairs": pairs,
        "sources": pd.DataFrame(sources, columns=["model", "file", "sha256"]),
    }


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table, the model's name first."""
    frame = pd.concat(frames, ignore_index=True)
    return frame[["model", *(column for column in frame.columns if column != "model")]]


def _draw(
    out: Path, models: Sequence[PublishedModel], tables: dict[str, pd.DataFrame], top: int
) -> list[tuple[str, Path]]:
    from matplotlib import pyplot as plt

    from focuslens.viz import depth_profiles, frequency_profiles, norms_by_rank, save_figure

    figures: list[tuple[str, Path]] = []

    def add(caption: str, ax: Any, name: str) -> None:
        figures.append((caption, save_figure(ax, out / f"{name}.png")))
        plt.close(ax.figure)

    for model, row in zip(models, tables["models"].to_dict(orient="records"), strict=True):
        ranked = tables["heads"].query("model == @model.name and rank.notna()")
        norms = (ranked[f"{part}_norm"].to_numpy(float) for part in ("query", "key"))
        ax = norms_by_rank(*norms, noise=row["initial_norm"], top=top, title=model.label)
        add(f"{model.label}: norms of d_Q and d_K by rank of the head.", ax, f"norms-{model.name}")
    frequency = {
        model.label: tables["frequency"].query("model == @model.name")["top"].to_numpy(float) for model in models
    }
    add(f"Energy of d_Q of the top {top} heads by rotary frequency.", frequency_profiles(frequency), "frequency")
    depth = {model.label: tables["depth"].query("model == @model.name")["share"].to_numpy(float) for model in models}
    add(f"Depth of the top {top} heads.", depth_profiles(depth), "depth")
    return figures


def _write_index(
    path: Path,
    models: Sequence[PublishedModel],
    summaries: Sequence[dict[str, Any]],
    pairs: pd.DataFrame,
    top: int,
    figures: Sequence[tuple[str, Path]],
) -> None:
    from focuslens.viz import write_report

    rankings = {f"ranking of {model.label}": _ranking_source(model) for model in models}
    digests = {f"directions of {model.label}": f"sha256 of all vectors {model.directions.digest}" for model in models}
    write_report(
        path,
        title="The published focus directions",
        facts={
            **rankings,
            **digests,
            "files": "each with its sha256 in sources.csv and published.json",
            "random draws": f"seed {_SEED}",
            "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        },
        findings=[_finding(row) for row in summaries],
        tables=_report_tables(models, summaries, pairs, top),
        figures=figures,
    )


def _ranking_source(model: PublishedModel) -> str:
    file, digest = next((file, digest) for file, digest in model.sources.items() if file.endswith(".json"))
    return f"{file}, sha256 {digest}"


def _finding(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}: the top {row['top']} of {row['n_layers'] * row['n_heads']} heads lie in layers "
        f"{row['first_layer']} to {row['last_layer']} of {row['n_layers']}. Their d_Q have norms of "
        f"{row['query_norm_top_min']:.1f} to {row['query_norm_top_max']:.1f}, their d_K, which act on nothing, of "
        f"{row['key_norm_top_min']:.2f} to {row['key_norm_top_max']:.2f}; the noise that training starts from has "
        f"{row['initial_norm']:.2f}. {row['quarter_1_top']:.1%} of the energy of d_Q is in the fastest quarter of the "
        f"rotary frequencies, {row['quarter_2_top']:.1%} in the next; pair {row['peak_pair_top']} of "
        f"{row['d_head'] // 2}, counted from 0, has {row['peak_share_top']:.1%} alone."
    )


def _report_tables(
    models: Sequence[PublishedModel], summaries: Sequence[dict[str, Any]], pairs: pd.DataFrame, top: int
) -> list[Any]:
    from focuslens.viz import Table

    def rows(columns: Sequence[str]) -> tuple[tuple[Any, ...], ...]:
        """Of every model, the best heads and all; columns are named without saying which."""
        return tuple(
            (model.label, f"top {top}" if of == "top" else of, *(row[name.format(of)] for name in columns))
            for model, row in zip(models, summaries, strict=True)
            for of in ("top", "all")
        )

    spread = {"least": "min", "median": "median", "most": "max"}
    parts = {"d_Q": "query", "d_K": "key"}
    norms = {f"{part}, {of}": f"{parts[part]}_norm_{{}}_{spread[of]}" for part in parts for of in spread}
    quarters = {name: f"quarter_{i}_{{}}" for i, name in enumerate(("first", "second", "third", "fourth"), start=1)}
    by_quarter = "Share of d_Q's energy by quarters of the rotary frequencies, fastest first, mean of the heads"
    tables = [
        Table("Norms of the directions", ("model", "heads", *norms), rows(list(norms.values()))),
        Table(by_quarter, ("model", "heads", *quarters), rows(list(quarters.values()))),
    ]
    for model in models:
        best = _top_heads(model, top)
        tables.append(Table(f"Norms of the top {top} heads: {model.label}", tuple(best.columns), _cells(best)))
    if len(models) > 1:
        caption = (
            f"The top {top} heads of every two models: (layer, head) pairs that both have, expected by chance, chance "
            "of as many; overlap of the depth profiles, its mean for random heads, chance of as much, correlation"
        )
        columns = tuple(name.replace("_", " ") for name in pairs.columns)
        tables.append(Table(caption, columns, _cells(_readable(pairs, models))))
    return tables


def _cells(frame: pd.DataFrame) -> tuple[tuple[Any, ...], ...]:
    """The rows, in Python's own numbers."""
    return tuple(tuple(row.values()) for row in frame.to_dict(orient="records"))

"""Statistics, tables, figures and HTML page of ``focuslens published``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from focuslens.cli.common import print_table
from focuslens.cli.figures import can_draw
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

__all__ = ["Survey"]

_SEED = 0
_BINS = 10
_SPREAD = {"least": "min", "median": "median", "most": "max"}


@dataclass(frozen=True)
class Survey:
    """Statistics of the directions that the paper's authors published, per model and per pair of models.

    Attributes:
        models: Published directions and head ranking of each model.
        summaries: One row of statistics per model.
        pairs: Table with one row per pair of models.
        top: Number of best heads that count as contextual.
    """

    models: tuple[PublishedModel, ...]
    summaries: tuple[dict[str, Any], ...]
    pairs: pd.DataFrame
    top: int

    @classmethod
    def of(cls, directory: str | Path, top: int) -> Survey:
        """Survey of all models in a directory that has the layout of the authors' files."""
        models = tuple(load_published(directory))
        summaries = tuple(summarize_published(model, top) for model in models)
        return cls(models, summaries, compare_published(models, top, _BINS, seed=_SEED), top)

    def print(self) -> None:
        """Print the statistics of each model and of each pair of models."""
        for model, row in zip(self.models, self.summaries, strict=True):
            _print_summary(row)
            print_table(_top_heads(model, self.top))
        if len(self.models) > 1:
            print(f"\nThe top {self.top} heads of every two models")
            print_table(self.readable_pairs())

    def result(self) -> dict[str, Any]:
        """Content of ``published.json``."""
        return {
            "command": "published",
            "top": self.top,
            "depth_bins": _BINS,
            "seed": _SEED,
            "models": list(self.summaries),
            "pairs": [
                {name: None if pd.isna(value) else value for name, value in row.items()}
                for row in self.pairs.to_dict(orient="records")
            ],
            "sources": {model.name: dict(model.sources) for model in self.models},
            "versions": versions(),
        }

    def write(self, out: Path) -> list[Path]:
        """Write ``published.json``, the tables, the figures and the HTML page, and return the paths of all files.

        Without the libraries for figures, the figures and the page are left out.
        """
        tables = self.tables()
        for name, frame in tables.items():
            write_atomically(out / f"{name}.csv", frame.to_csv(index=False).encode())
        write_json(out / "published.json", self.result())
        files = [out / "published.json", *(out / f"{name}.csv" for name in tables)]
        drawn = self.write_page(out, tables) if can_draw() else []
        print(f"\nwrote published.json, {len(tables)} tables{', figures and index.html' if drawn else ''} to {out}")
        return [*files, *drawn]

    def write_page(self, out: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
        """Write the figures and the HTML page, and return their paths."""
        figures = self.draw(out, tables)
        self.write_index(out / "index.html", figures)
        return [out / "index.html", *(path for _, path in figures)]

    def readable_pairs(self) -> pd.DataFrame:
        """Table of pairs of models. The models' names omit the owner on the hub."""
        labels = {model.name: model.label for model in self.models}
        return self.pairs.assign(first=self.pairs["first"].map(labels), second=self.pairs["second"].map(labels))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables by file name (without suffix)."""
        heads, frequencies, depths = ([] for _ in range(3))
        for model in self.models:
            heads.append(head_table(model).assign(model=model.name))
            frequencies.append(frequency_profile(model, self.top).assign(model=model.name))
            profile = depth_profile(model.top(self.top), model.n_layers, _BINS)
            depths.append(pd.DataFrame({"bin": range(_BINS), "share": profile}).assign(model=model.name))
        sources = [(model.name, *source) for model in self.models for source in model.sources.items()]
        return {
            "models": pd.DataFrame(self.summaries),
            "heads": _joined(heads),
            "frequency": _joined(frequencies),
            "depth": _joined(depths),
            "pairs": self.pairs,
            "sources": pd.DataFrame(sources, columns=["model", "file", "sha256"]),
        }

    def draw(self, out: Path, tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, Path]]:
        """Draw and save the figures, and return the caption and path of each figure."""
        from matplotlib import pyplot as plt

        from focuslens.viz import save_figure

        figures: list[tuple[str, Path]] = []
        for caption, ax, name in self.figures(tables):
            figures.append((caption, save_figure(ax, out / f"{name}.png")))
            plt.close(ax.figure)
        return figures

    def figures(self, tables: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, Any, str]]:
        """Caption, axes and file name (without suffix) of each figure."""
        from focuslens.viz import depth_profiles, frequency_profiles, norms_by_rank

        def columns(table: str, column: str) -> dict[str, Any]:
            frames = {model.label: tables[table].query("model == @model.name") for model in self.models}
            return {label: frame[column].to_numpy(float) for label, frame in frames.items()}

        for model, row in zip(self.models, self.summaries, strict=True):
            ranked = tables["heads"].query("model == @model.name and rank.notna()")
            norms = (ranked[f"{part}_norm"].to_numpy(float) for part in ("query", "key"))
            ax = norms_by_rank(*norms, noise=row["initial_norm"], top=self.top, title=model.label)
            yield f"{model.label}: norms of d_Q and d_K by rank of the head.", ax, f"norms-{model.name}"
        frequencies = frequency_profiles(columns("frequency", "top"))
        yield f"Energy of d_Q of the top {self.top} heads by rotary frequency.", frequencies, "frequency"
        yield f"Depth of the top {self.top} heads.", depth_profiles(columns("depth", "share")), "depth"

    def write_index(self, path: Path, figures: Sequence[tuple[str, Path]]) -> None:
        """Write the HTML page with the findings, tables and figures."""
        from focuslens.viz import write_report

        rankings = {f"ranking of {model.label}": _ranking_source(model) for model in self.models}
        digests = {
            f"directions of {model.label}": f"sha256 of all vectors {model.directions.digest}" for model in self.models
        }
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
            findings=[_finding(row) for row in self.summaries],
            tables=self.report_tables(),
            figures=figures,
        )

    def report_tables(self) -> list[Any]:
        """Tables of the HTML page."""
        from focuslens.viz import Table

        norms = {
            f"{part}, {of}": f"{kind}_norm_{{}}_{statistic}"
            for part, kind in (("d_Q", "query"), ("d_K", "key"))
            for of, statistic in _SPREAD.items()
        }
        quarters = {name: f"quarter_{i}_{{}}" for i, name in enumerate(("first", "second", "third", "fourth"), start=1)}
        by_quarter = "Share of d_Q's energy by quarters of the rotary frequencies, fastest first, mean of the heads"
        tables = [
            Table("Norms of the directions", ("model", "heads", *norms), self._rows(list(norms.values()))),
            Table(by_quarter, ("model", "heads", *quarters), self._rows(list(quarters.values()))),
        ]
        for model in self.models:
            best = _top_heads(model, self.top)
            tables.append(Table(f"Norms of the top {self.top} heads: {model.label}", tuple(best.columns), _cells(best)))
        if len(self.models) > 1:
            caption = (
                f"The top {self.top} heads of every two models: (layer, head) pairs that both have, expected by "
                "chance, chance of as many; overlap of the depth profiles, its mean for random heads, chance of as "
                "much, correlation"
            )
            columns = tuple(name.replace("_", " ") for name in self.pairs.columns)
            tables.append(Table(caption, columns, _cells(self.readable_pairs())))
        return tables

    def _rows(self, columns: Sequence[str]) -> tuple[tuple[Any, ...], ...]:
        """Two rows per model: the first for the model's best heads, and the second for all its heads.

        In the name of each column, ``{}`` is replaced with ``top`` in the first row and ``all`` in the second row.
        """
        return tuple(
            (
                model.label,
                f"top {self.top}" if heads == "top" else heads,
                *(row[name.format(heads)] for name in columns),
            )
            for model, row in zip(self.models, self.summaries, strict=True)
            for heads in ("top", "all")
        )


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


def _three(row: dict[str, Any], part: str, name: str, form: str) -> str:
    return " ".join(format(row[f"{part}_norm_{name}_{of}"], form) for of in _SPREAD.values())


def _top_heads(model: PublishedModel, top: int) -> pd.DataFrame:
    """Norms of the best heads' directions, also as multiples of the norm of the initial vectors in training."""
    table, noise = head_table(model).head(top), initial_norm(model.directions.d_head)
    frame = table[["rank", "layer", "head"]].astype("int64")
    for name, part in (("d_Q", "query_norm"), ("d_K", "key_norm")):
        frame[name], frame[f"{name} / noise"] = table[part], table[part] / noise
    return frame


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenation of tables, with the model's name in the first column."""
    frame = pd.concat(frames, ignore_index=True)
    return frame[["model", *(column for column in frame.columns if column != "model")]]


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


def _cells(frame: pd.DataFrame) -> tuple[tuple[Any, ...], ...]:
    """Rows of a table, with Python numbers in place of NumPy numbers."""
    return tuple(tuple(row.values()) for row in frame.to_dict(orient="records"))

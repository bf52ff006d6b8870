"""Tables of ``docs/real-models.md`` out of the published results in ``experiments/real_models``.

python experiments/real_models_page.py          # print the tables
python experiments/real_models_page.py --write  # put them into the page, between its comments, and draw its figure
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from focuslens.evaluation import Interval, Setting, Sweep, load_sweep
from focuslens.util.files import write_atomically
from focuslens.util.statistics import percentile_interval
from focuslens.viz import curves, split_softmax_curves

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "real_models"
PAGE = ROOT / "docs" / "real-models.md"
FIGURE = ROOT / "docs" / "real_split_softmax.png"
FIRST = "smollm2-135m-instruct"
"""Settings whose results the figure shows."""
RESAMPLES = 2000

CONDITIONS = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct, 10 documents, BM25",
    "smollm2-135m-instruct-random": "SmolLM2-135M-Instruct, 10 documents, random",
    "smollm2-135m-instruct-20": "SmolLM2-135M-Instruct, 20 documents, BM25",
    "smollm2-135m-instruct-20-random": "SmolLM2-135M-Instruct, 20 documents, random",
    "gemma-3-270m": "Gemma 3 270M (base), 10 documents, BM25",
}
"""Name in the tables of each settings file of ``focuslens paper`` that was run."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/real-models.md")
    args = parser.parse_args(argv)
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), tables()))
        draw(RESULTS / FIRST, FIGURE)
    else:
        for name, table in tables().items():
            print(f"## {name}\n\n{table}\n")


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with every table between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z0-9-]+) -->.*?<!-- end -->", replaced, page, flags=re.DOTALL)


def tables() -> dict[str, str]:
    """Every table as Markdown, by name."""
    found = {name: RESULTS / name for name in CONDITIONS if (RESULTS / name).is_dir()}
    makers: dict[str, Callable[[dict[str, Path]], str]] = {
        "cases": cases,
        "chosen": chosen,
        "grid": grid,
        "heads": heads,
        "stability": stability,
        "findings": findings,
        "runs": runs,
    }
    return {name: make(found) for name, make in makers.items()}


# What was published


def artefact(folder: Path, key: str) -> dict[str, Any] | None:
    path = folder / f"{key}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def sweeps(folder: Path, part: str, key: str = "split_softmax") -> list[Sweep]:
    """Sweeps of a part, the one with the most settings first."""
    loaded: list[Sweep] = []
    for path in sorted(folder.glob(f"{key}-{part}-*.jsonl.gz")):
        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(temporary) / "sweep.jsonl"
            plain.write_bytes(gzip.decompress(path.read_bytes()))
            loaded.append(load_sweep(plain))
    return sorted(loaded, key=lambda sweep: -len(sweep.settings))


def chosen_setting(folder: Path) -> Setting | None:
    """Setting that is best on validation questions, as the artefact's table names it."""
    content = artefact(folder, "split_softmax")
    if content is None:
        return None
    name = next(row[1] for row in content["tables"][0]["rows"] if row[0] == "chosen on validation")
    return next(setting for setting in sweeps(folder, "test")[0].settings if setting.name == name)


def relevant(folder: Path) -> dict[str, np.ndarray]:
    """Relevant scores ``[sample layer head]`` by part."""
    path = folder / "relevant_scores.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, "numpy") as file:
        return {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118  (no mapping)


# Tables


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def shown(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def cases(found: dict[str, Path]) -> str:
    """Exact match with all documents, the relevant one alone, and the others alone."""
    rows: list[tuple[str, ...]] = []
    for name, folder in found.items():
        whole = next((sweep for sweep in sweeps(folder, "test") if "gold" in sweep.evaluations), None)
        if whole is not None:
            n = str(len(whole["baseline"]))
            rows.append((CONDITIONS[name], n, *(shown(whole[case].em) for case in ("baseline", "gold", "negative"))))
    return markdown(("model and prompts", "questions", "all documents", "the relevant one alone", "the others"), rows)


def comparison(sweep: Sweep, name: str) -> tuple[str, str]:
    test = sweep[name].compare(sweep["baseline"])
    return (
        f"{test.only_first} / {test.only_second}",
        f"{test.p_value:.1e}" if test.p_value < 0.001 else f"{test.p_value:.3f}",
    )


def chosen(found: dict[str, Path]) -> str:
    """Split-softmax with the setting chosen on validation questions, and its controls."""
    rows: list[tuple[str, ...]] = []
    for name, folder in found.items():
        setting = chosen_setting(folder)
        if setting is None:
            continue
        test, k = sweeps(folder, "test")[0], setting.parameters["k"]
        rows.append(
            (CONDITIONS[name], "no intervention", str(len(test["baseline"])), shown(test["baseline"].em), "", "")
        )
        for kind, wanted in controls(test, setting, k):
            evaluation = test[wanted.name]
            rows.append(
                (
                    CONDITIONS[name],
                    f"{kind}: {wanted.name}",
                    str(len(evaluation)),
                    shown(evaluation.em),
                    *comparison(test, wanted.name),
                )
            )
    columns = ("model and prompts", "setting", "questions", "exact match", "gained / lost", "McNemar's exact p")
    return markdown(columns, rows)


def controls(test: Sweep, setting: Setting, k: int) -> list[tuple[str, Setting]]:
    contextual = [other for other in test.settings if other.parameters.get("heads") == "contextual"]
    lowered = [other for other in contextual if other.parameters["tau"] > 1 and other.parameters["k"] == k]
    random = [
        other for other in test.settings if other.parameters.get("heads") == "random" and other.parameters["k"] == k
    ]
    named = [("chosen on validation questions", setting)]
    named += (
        [("the same heads turned down", max(lowered, key=lambda other: other.parameters["tau"]))] if lowered else []
    )
    return [*named, *(("random heads", other) for other in random[:1])]


def grid(found: dict[str, Path]) -> str:
    """Exact match by exponent and number of heads (Figure 3)."""
    rows: list[tuple[str, ...]] = []
    for name, folder in found.items():
        loaded = sweeps(folder, "test")
        if not loaded:
            continue
        test = loaded[0]
        varied = [setting for setting in test.settings if "tau" in setting.parameters]
        ks = sorted({setting.parameters["k"] for setting in varied})
        for kind in ("contextual", "random"):
            for tau in sorted({s.parameters["tau"] for s in varied if s.parameters["heads"] == kind}):
                at = {
                    s.parameters["k"]: s for s in varied if (s.parameters["heads"], s.parameters["tau"]) == (kind, tau)
                }
                cells = ", ".join(f"k = {k}: {test[at[k].name].em.mean:.2f}" for k in ks if k in at)
                rows.append((CONDITIONS[name], kind, f"{tau:g}", cells))
    return markdown(("model and prompts", "heads", "tau", "exact match"), rows)


def heads(found: dict[str, Path]) -> str:
    """Best heads by relevant score on training questions (Figure 2)."""
    rows: list[tuple[str, ...]] = []
    for name, folder in found.items():
        scores = relevant(folder).get("train")
        if scores is None:
            continue
        means = np.nanmean(scores, axis=0)
        order = np.argsort(-means, axis=None, kind="stable")[:8]
        best = [np.unravel_index(place, means.shape) for place in order]
        listed = ", ".join(f"({layer}, {head}) {means[layer, head]:.3f}" for layer, head in best)
        counts = " / ".join(str(int((means > level).sum())) for level in (0.2, 0.1, 0.05))
        rows.append((CONDITIONS[name], str(len(scores)), listed, f"{counts} of {means.size}"))
    columns = ("model and prompts", "questions", "best heads (layer, head)", "heads above 0.2 / 0.1 / 0.05")
    return markdown(columns, rows)


def stability(found: dict[str, Path]) -> str:
    """Agreement of the rankings from two disjoint halves of the questions, with intervals over questions."""
    rows: list[tuple[str, ...]] = []
    for name, folder in found.items():
        parts = relevant(folder)
        if not parts:
            continue
        scores = np.concatenate([values.reshape(len(values), -1) for values in parts.values()])
        scores = scores[~np.isnan(scores).any(axis=1)]
        first, second = scores[::2], scores[1::2]
        generator = np.random.default_rng(0)
        drawn = [agreement(resampled(first, generator), resampled(second, generator)) for _ in range(RESAMPLES)]
        measured = agreement(first, second)
        cells = [
            shown(percentile_interval(value, np.array([each[i] for each in drawn]))) for i, value in enumerate(measured)
        ]
        rows.append((CONDITIONS[name], f"{len(first)} and {len(second)}", *cells))
    columns = (
        "model and prompts",
        "questions",
        "rank correlation (Spearman)",
        "overlap of the top 10",
        "of the top 20",
    )
    return markdown(columns, rows)


def resampled(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return values[generator.integers(len(values), size=len(values))]


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation of the heads' means, and the shares of common heads in the top 10 and 20."""
    means = first.mean(axis=0), second.mean(axis=0)
    ranks = [np.argsort(np.argsort(-values, kind="stable")) for values in means]
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    common = [len(set(np.flatnonzero(ranks[0] < n)) & set(np.flatnonzero(ranks[1] < n))) / n for n in (10, 20)]
    return correlation, common[0], common[1]


def findings(found: dict[str, Path]) -> str:
    """Every finding with a verdict, as ``focuslens paper`` wrote it."""
    rows: list[tuple[str, ...]] = []
    for name, folder in found.items():
        for key in ("heads", "split_softmax", "steering", "steered_scores", "retrieval"):
            content = artefact(folder, key)
            for text, verdict in [] if content is None else content["findings"]:
                if verdict:
                    rows.append((CONDITIONS[name], content["paper"] if content else "", text, f"**{verdict}**"))
    return markdown(("model and prompts", "in the paper", "finding", "verdict"), rows)


def runs(found: dict[str, Path]) -> str:
    """Origin of every result: weights, quantisation, data, versions."""
    rows: list[tuple[str, ...]] = []
    for name, folder in found.items():
        content = artefact(folder, "heads") or artefact(folder, "split_softmax")
        if content is None:
            continue
        header = content["header"]
        model, data = header["model"], header["settings"]["data"]
        gguf = model["gguf"]
        versions = ", ".join(f"{package} {header['versions'][package]}" for package in ("torch", "transformers"))
        questions = f"{data['train']} training, {data['validation']} validation and {data['test']} test questions"
        rows.append(
            (name, f"{gguf['file']}, {gguf['quantization']}, SHA-256 {gguf['sha256'][:12]}", questions, versions)
        )
    return markdown(("settings", "weights", "questions", "versions"), rows)


def draw(folder: Path, path: Path) -> None:
    """Draw exact match by exponent and number of heads, with the levels of the three cases (Figure 3)."""
    loaded = sweeps(folder, "test")
    cases = next((sweep for sweep in loaded if "gold" in sweep.evaluations), None)
    if cases is None:
        return
    levels = {
        "all documents": cases["baseline"].em,
        "relevant document only": cases["gold"].em,
        "no relevant document": cases["negative"].em,
    }
    lines = curves(loaded[0], "tau", heads="contextual") + curves(loaded[0], "tau", heads="random")
    axes = split_softmax_curves(lines, levels, title=CONDITIONS[folder.name])
    picture = BytesIO()
    figure: Any = axes.get_figure(root=True)
    figure.savefig(picture, dpi=144, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, picture.getvalue())


if __name__ == "__main__":
    main()

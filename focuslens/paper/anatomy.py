"""What a focus direction is made of, where attention goes under it, and whether site and rows matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from focuslens.anatomy import (
    HeadKeys,
    collect_keys,
    decompose_heads,
    frequency_energy,
    position_bias,
    token_preferences,
)
from focuslens.evaluation import BUDGET_PARTS, Setting, Sweep, attention_budget
from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.paper.artefact import Artefact, Finding, keep_figure, write_csv
from focuslens.paper.scored import head_mean
from focuslens.paper.steering import steerable
from focuslens.paper.study import Study
from focuslens.scoring import KINDS, ContextualScores
from focuslens.viz import Curve, Table, sweep_curves
from focuslens.viz.anatomy import frequency_profiles, position_biases, variance_parts
from focuslens.viz.report import Cell

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "anatomy"
SECTIONS = ("directions", "anatomy")


def run(study: Study) -> Artefact:
    """Content and position, frequencies, tokens, attention budget, sites and rows."""
    heads = steerable(study)
    figures: list[tuple[str, str]] = []
    tables: list[Table] = []
    findings: list[Finding] = []
    if study.directions.site == "rotary":
        keys = _keys(study, heads[: study.settings.anatomy.heads])
        figures += _drawn(study, keys)
        parts, sentence = _parts(study, keys)
        tables += [parts, _tokens(study, keys)]
        findings.append(sentence)
    budget, drawn, spent = _budget(study, heads)
    compared, sentences = _sites(study, heads)
    return Artefact(
        KEY,
        "Anatomy of a direction",
        "beyond the paper",
        (*findings, spent, *sentences),
        (*figures, drawn),
        (*tables, budget, compared),
    )


def _keys(study: Study, heads: Sequence[Head]) -> dict[Head, HeadKeys]:
    wanted = study.settings.anatomy
    prompts = [sample.prompt("long") for sample in study.samples("validation")[: wanted.samples]]
    return collect_keys(study.model, prompts, heads, wanted.keys, seed=study.settings.seed)


def _positions(keys: Mapping[Head, HeadKeys]) -> torch.Tensor:
    return torch.arange(1 + max(int(one.positions.max()) for one in keys.values()))


def _drawn(study: Study, keys: Mapping[Head, HeadKeys]) -> list[tuple[str, str]]:
    """Pictures of frequencies, of positions, and of what the bias depends on."""
    folder, directions, positions = study.folder(KEY), study.directions.select(keys), _positions(keys)
    biases = {}
    pairs = {}
    for head, vector in zip(keys, directions.query, strict=True):
        rotary = study.model.backend.rotary(head.layer, len(positions))
        scale = study.model.backend.scale(head.layer)
        mean = keys[head].contents.mean(dim=0)
        biases[str(head)] = position_bias(vector, mean, rotary, positions, scale).numpy()
        energy = frequency_energy(vector[None], adjacent_pairs=rotary.adjacent_pairs, rotary_dim=2 * _pairs(rotary.cos))
        pairs[str(head)] = energy[0, : _pairs(rotary.cos)].numpy()
    frame = decompose_heads(study.model, study.directions, dict(keys), positions)
    energies = [(head, pair, float(share)) for head, own in pairs.items() for pair, share in enumerate(own)]
    write_csv(folder / "frequencies.csv", ("head", "rotary pair, fastest first", "share of energy"), energies)
    lines = [(int(position), *(float(own[i]) for own in biases.values())) for i, position in enumerate(positions)]
    write_csv(folder / "positions.csv", ("position", *biases), lines)
    keep_figure(frequency_profiles(pairs), folder / "frequencies.png")
    keep_figure(position_biases(positions.numpy(), biases), folder / "positions.png")
    shares = (frame[name].to_numpy() for name in ("content", "position", "interaction"))
    keep_figure(variance_parts([str(head) for head in keys], *shares), folder / "variance.png")
    return [
        ("Where a direction's energy lies among the rotary frequencies, fastest first; 1 is an even spread.",
         "frequencies.png"),
        ("What a direction adds to the logit of a key of average content, by its absolute position (alpha = 1).",
         "positions.png"),
        ("How much of the variance of that addition is the key's content, its position, and both together.",
         "variance.png"),
    ]  # fmt: skip


def _pairs(cos: torch.Tensor) -> int:
    """Rotated pairs of a head, from its table of ``[pos rotary]``."""
    return cos.shape[-1] // 2


def _parts(study: Study, keys: Mapping[Head, HeadKeys]) -> tuple[Table, Finding]:
    frame = decompose_heads(study.model, study.directions, dict(keys), _positions(keys))
    rows: list[tuple[Cell, ...]] = []
    shares: list[float] = []
    columns = [frame[name].tolist() for name in ("total", "content", "position", "interaction")]
    for head, total, *parts in zip(keys, *columns, strict=True):
        shares.append(parts[0] / total)
        rows.append((str(head), total**0.5, *(part / total for part in parts)))
    table = Table(
        "What directions add to a key's logit at alpha = 1, every content at every position: standard deviation, and "
        "shares of its variance",
        ("head", "standard deviation (logits)", "content", "position", "interaction"),
        tuple(rows),
    )
    mean = sum(shares) / len(shares)
    return table, Finding(
        f"Of what the first {len(rows)} directions add to the logits, {100 * mean:.0f} % of the variance is content "
        "(which token, whatever its place), the rest position or both together."
    )


def _tokens(study: Study, keys: Mapping[Head, HeadKeys]) -> Table:
    """The tokens that each head's direction favours most and least."""
    columns = ("head", "favoured", "count", "bias", "disfavoured", "count ", "bias ")
    rows = tuple((str(head), *row) for head in keys for row in _tokens_of(study, keys, head))
    return Table(
        "Tokens whose keys directions favour and disfavour most, in logits at alpha = 1, positions averaged out",
        columns,
        rows,
    )


def _tokens_of(study: Study, keys: Mapping[Head, HeadKeys], head: Head) -> list[tuple[Cell, ...]]:
    own, positions, n = keys[head], _positions(keys), study.settings.anatomy.tokens
    rotary = study.model.backend.rotary(head.layer, len(positions))
    frame = token_preferences(
        study.directions.select([head]).query[0],
        own.contents,
        own.token_ids,
        rotary,
        positions,
        study.model.backend.scale(head.layer),
        tokenizer=study.model.tokenizer,
    )
    records = frame.to_dict("records")
    return [
        tuple(cell for one in pair for cell in (repr(one["text"]), int(one["count"]), float(one["mean_bias"])))
        for pair in zip(records[:n], records[::-1][:n], strict=True)
    ]


def _budget(study: Study, heads: Sequence[Head]) -> tuple[Table, tuple[str, str], Finding]:
    """Where the steered heads' attention goes at each strength."""
    wanted, settings = study.settings.anatomy, study.settings
    steered = list(heads[: wanted.k])
    samples = study.samples("validation")[: wanted.samples]
    shares: dict[float, dict[str, float]] = {}
    for alpha in sorted({0.0, *wanted.alphas}):
        focus = [FocusSteering(study.directions, alpha, steered)] if alpha else []
        found = attention_budget(
            study.executor,
            samples,
            interventions=focus,
            max_new_tokens=settings.max_new_tokens,
            batch_tokens=settings.batch_tokens,
            progress=study.progress,
        )
        shares[alpha] = found.mean(steered)
    alphas = tuple(shares)
    lines = [
        Curve(part, alphas, *(tuple(shares[alpha][part] for alpha in alphas) for _ in range(3)))
        for part in BUDGET_PARTS
    ]
    axes = sweep_curves(
        lines,
        x_label="alpha",
        y_label="share of attention",
        title=f"Attention of the top {len(steered)} heads",
    )
    keep_figure(axes, study.folder(KEY) / "budget.png")
    table = Table(
        f"Where the attention of response tokens goes, mean of the {len(steered)} steered heads on {len(samples)} "
        "validation prompts; each line sums to 1",
        ("alpha", *BUDGET_PARTS),
        tuple((f"{alpha:g}", *(shares[alpha][part] for part in BUDGET_PARTS)) for alpha in alphas),
    )
    largest = max(alphas)
    moved = {part: shares[largest][part] - shares[0.0][part] for part in BUDGET_PARTS}
    gains, losses = max(moved, key=lambda part: moved[part]), min(moved, key=lambda part: moved[part])
    return (
        table,
        ("Where the steered heads' attention goes at each strength.", "budget.png"),
        Finding(
            f"At alpha = {largest:g} attention moves most from {losses} ({moved[losses]:+.3f}) to {gains} "
            f"({moved[gains]:+.3f}); the relevant document gets {moved['relevant']:+.3f}."
        ),
    )


def _sites(study: Study, heads: Sequence[Head]) -> tuple[Table, list[Finding]]:
    """Exact match and scores of directions at both sites, on all rows and on the response's alone."""
    wanted = study.settings.anatomy
    k = min(wanted.k, len(heads))
    sites: list[Literal["rotary", "projection"]] = ["rotary", "projection"]
    if study.settings.directions.source != "train":
        sites = [study.directions.site]
    settings = [Setting("baseline")]
    for site in sites:
        directions = study.directions_at(site)
        for positions in ("all", "response"):
            settings += [
                Setting(
                    f"{site}, {positions}, alpha={alpha:g} k={k}",
                    (FocusSteering(directions, alpha, heads[:k], positions),),
                    parameters={"site": site, "positions": positions, "alpha": alpha, "k": k},
                )
                for alpha in wanted.alphas
            ]
    sweep = study.sweep(KEY, "validation", settings)
    rows: list[tuple[Cell, ...]] = []
    for setting, row in zip(sweep.settings, sweep.rows(), strict=True):
        measured = study.scores("validation", "long", setting.interventions)
        means = [_mean_of_heads(measured, kind, heads[:k]) for kind in KINDS]
        rows.append((row["name"], row["em"], row["em_low"], row["em_high"], f"{row['mcnemar_p']:.2g}", *means))
    table = Table(
        "Exact match on validation questions by site, rows and strength, with 95 % intervals and exact p, and mean "
        f"contextual scores of the {k} steered heads",
        ("setting", "exact match", "low", "high", "p", "R", "IR", "IR max", "sink"),
        tuple(rows),
    )
    return table, [_best_of(sweep, settings, name, value) for name, value in _kinds(sites)]


def _mean_of_heads(scores: ContextualScores, kind: str, heads: Sequence[Head]) -> float | str:
    means = [head_mean(scores, kind, head) for head in heads]
    known = [one for one in means if one is not None]
    return sum(known) / len(known) if known else "-"


def _kinds(sites: Sequence[str]) -> list[tuple[str, str]]:
    return [("site", site) for site in sites] + [("positions", one) for one in ("all", "response")]


def _best_of(sweep: Sweep, settings: Sequence[Setting], name: str, value: str) -> Finding:
    those = [one for one in settings if one.parameters.get(name) == value]
    best = max(those, key=lambda one: sweep[one.name].em.mean)
    what = f"At the {value} site" if name == "site" else f"Steering {value} rows"
    return Finding(
        f"{what} the best of the strengths tried ({best.name}) gives {sweep[best.name].em} on validation questions, "
        f"against {sweep['baseline'].em} without."
    )

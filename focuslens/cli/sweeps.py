"""Steps that ``focuslens split-softmax``, ``focuslens steer`` and ``focuslens demo`` share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli.common import RunSettings, Samples, print_sweep, run_description
from focuslens.cli.figures import save_drawn
from focuslens.cli.output import document
from focuslens.cli.rankings import remove_scores

if TYPE_CHECKING:
    from focuslens.evaluation import Setting, Sweep
    from focuslens.heads import Head
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = ["controls", "finish", "first_heads", "possible_counts", "sweep_to"]

_LOG = logging.getLogger(__name__)


def controls(
    model: FocusModel | Executor,
    ranking: Sequence[Head],
    ks: Sequence[int],
    *,
    tau: float | None,
    exclude: int,
    seed: int,
) -> list[Setting]:
    """Split-softmax settings on random heads, as a control. The contextual heads of the sweep are never drawn.

    Args:
        model: Model that the sweep runs on.
        ranking: Contextual heads, best first.
        ks: Numbers of random heads.
        tau: Exponent of split-softmax. If ``None``, there are no settings.
        exclude: Number of best heads to exclude from the draw. A number above half of all heads is lowered to half of
            all heads. A number below ``max(ks)`` is then raised to ``max(ks)``.
        seed: Seed of the draw.
    """
    from focuslens.evaluation import split_softmax_settings
    from focuslens.heads import random_heads

    n = model.shape.n_layers * model.shape.n_heads
    contextual = ranking[: max(min(exclude, n // 2), *ks)]
    impossible = [k for k in ks if k > n - len(contextual)]
    if impossible:
        _LOG.warning(
            "no random heads for --k %s: %d heads are left beside the %d best",
            ",".join(map(str, impossible)),
            n - len(contextual),
            len(contextual),
        )
    possible = [k for k in ks if k not in impossible]
    if tau is None or not possible:
        return []
    heads = random_heads(model.shape.n_layers, model.shape.n_heads, max(possible), exclude=contextual, seed=seed)
    return split_softmax_settings(heads, [tau], possible, label="random")


def possible_counts(ks: Sequence[int], n: int) -> list[int]:
    """Values of ``--k`` between 1 and ``n``. A warning lists the values outside this range.

    Raises:
        ValueError: If all values are outside this range.
    """
    possible = [k for k in ks if 1 <= k <= n]
    if not possible:
        raise ValueError(
            f"--k {','.join(map(str, ks))}: there are {n} heads to choose from; give numbers from 1 to {n}"
        )
    if len(possible) < len(ks):
        _LOG.warning(
            "left out of --k, since there are %d heads: %s", n, ", ".join(str(k) for k in ks if k not in possible)
        )
    return possible


def first_heads(heads: Sequence[Head], ks: Sequence[int]) -> list[list[int]]:
    """The largest set of heads in the sweep, as JSON values."""
    return [list(head) for head in heads[: max(ks, default=0)]]


def sweep_to(
    settings: RunSettings,
    model: FocusModel | Executor,
    data: Samples,
    grid: Sequence[Setting],
    out: Path | None,
) -> Sweep:
    """Run a sweep. If ``out`` is given, records are written to this file, from which a killed run resumes."""
    from focuslens.evaluation import run_sweep

    return run_sweep(
        model,
        data.samples,
        grid,
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=settings.batch_tokens,
        out=out,
        data=data.description,
        seed=settings.seed,
    )


def finish(
    settings: RunSettings,
    model: Executor,
    data: Samples,
    sweep: Sweep,
    name: str,
    draw: Callable[[], Any],
    entries: dict[str, Any],
) -> dict[str, Any]:
    """Print a sweep's table and, with ``--out``, write the results and a figure.

    Args:
        settings: Settings of the command.
        model: Model that the sweep ran on.
        data: Samples of the sweep.
        sweep: The finished sweep.
        name: Name of the files, without suffix.
        draw: Function that draws the figure.
        entries: Additional entries of the result file.

    Returns:
        Content of the result file.
    """
    from focuslens.util.files import write_json

    _LOG.info("intervals and tests of %d settings", len(sweep.settings))
    print_sweep(sweep)
    result = {**run_description(settings, model, data), **entries, "settings": sweep.rows()}
    out = settings.out
    if out is None:
        return document(result)
    write_json(out / f"{name}.json", result)
    files = [out / f"{name}.jsonl", out / f"{name}.json", *save_drawn(draw, out / f"{name}.png")]
    remove_scores(settings)
    print(f"\nwrote {', '.join(path.name for path in files)} to {out}")
    return document(result, *files)

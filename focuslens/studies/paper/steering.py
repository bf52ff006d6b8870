"""Figures 4, 7 and 8: accuracy under focus directions of different strengths on different numbers of heads."""

from __future__ import annotations

from focuslens.evaluation import Setting, Sweep, best_setting, steering_settings
from focuslens.heads import Head
from focuslens.studies.paper import reported
from focuslens.studies.paper.artefact import Artefact, Finding, keep_curves, keep_figure
from focuslens.studies.paper.choosing import chosen_table, gain_of_more, possible, verdict_of
from focuslens.studies.paper.study import Study
from focuslens.util.files import write_csv
from focuslens.viz import curves, direction_curves, loss_curves, sweep_table

__all__ = ["KEY", "SECTIONS", "run", "steerable"]

KEY = "steering"
SECTIONS = ("directions", "steering")


def steerable(study: Study) -> list[Head]:
    """Heads of the ranking that have a direction, best first."""
    have = set(study.directions.heads)
    return [head for head in study.ranking if head in have]


def run(study: Study) -> Artefact:
    """Sweep strengths and numbers of heads on test questions; choose on validation questions."""
    wanted, heads = study.settings.steering, steerable(study)
    ks = possible(wanted.ks, len(heads))
    grid = steering_settings(study.directions, heads, wanted.alphas, ks)
    settings = [Setting("baseline"), *grid]
    validation, test = study.sweep(KEY, "validation", settings), study.sweep(KEY, "test", settings)
    lines, level = curves(test, "alpha"), {"all documents": test["baseline"].em}
    keep_curves(direction_curves(lines, level), study.folder(KEY) / "steering.png", lines, level)
    table, _ = chosen_table(validation, test, grid)
    figures = [
        (
            "Exact match over the number k of heads for each strength alpha, with 95 % bootstrap intervals.",
            "steering.png",
        )
    ]
    losses = study.directions.losses
    if losses is not None:
        names = [str(head) for head in study.directions.heads]
        keep_figure(loss_curves(losses.numpy(), names), study.folder(KEY) / "losses.png")
        rows = [(epoch, *line) for epoch, line in enumerate(losses.tolist(), start=1)]
        write_csv(study.folder(KEY) / "losses.csv", ("epoch", *names), rows)
        figures.append(("Training loss of each head's direction: minus its contextual score.", "losses.png"))
    return Artefact(
        KEY,
        "Focus directions",
        "Figures 4, 7 and 8",
        tuple(_findings(validation, test, grid, wanted.contextual)),
        tuple(figures),
        (table, sweep_table("Focus directions on test questions (baseline: no steering)", test)),
        (reported.FIGURE_4,),
    )


def _findings(validation: Sweep, test: Sweep, grid: list[Setting], contextual: int) -> list[Finding]:
    """What the paper says of directions: the best strength above 0, the ends of the line, and too many heads."""
    towards = [one for one in grid if one.parameters["alpha"] > 0]
    if not towards:
        return []
    chosen = best_setting(validation, towards)
    at_k = [one for one in grid if one.parameters["k"] == chosen.parameters["k"]]
    least, most = (end(at_k, key=lambda one: one.parameters["alpha"]) for end in (min, max))
    found = [
        Finding(
            f"A focus direction mitigates distraction: {chosen.name}, chosen on validation questions, gives "
            f"{test[chosen.name].em} on test questions against {test['baseline'].em} without.",
            verdict_of(test, chosen.name, higher=True),
        )
    ]
    ends = [(least, "The opposite direction leads to more distraction")] if least.parameters["alpha"] < 0 else []
    if most is not chosen:
        ends.append((most, "Too strong a direction distracts as well"))
    for one, text in ends:
        verdict = verdict_of(test, one.name, higher=False)
        found.append(Finding(f"{text}: {one.name} gives {test[one.name].em}.", verdict))
    return [*found, gain_of_more(test, towards, contextual, "Steering")]

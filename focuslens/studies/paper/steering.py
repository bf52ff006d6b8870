"""Figures 4, 7 and 8: accuracy under focus directions of different strengths on different numbers of heads."""

from __future__ import annotations

from focuslens.evaluation import Setting, Sweep, best_setting, steering_settings
from focuslens.heads import Head
from focuslens.studies.paper import paper_values
from focuslens.studies.paper.artefact import Artefact, Finding, keep_curves, keep_figure
from focuslens.studies.paper.chosen_settings import chosen_table, compared, gain_of_more, possible, verdict_of
from focuslens.studies.paper.study import Study
from focuslens.util.files import write_csv
from focuslens.viz import curves, direction_curves, loss_curves, sweep_table

__all__ = ["KEY", "SECTIONS", "run", "steerable"]

KEY = "steering"
SECTIONS = ("directions", "steering")


def steerable(study: Study) -> list[Head]:
    """Heads that have a direction, in the order of the ranking."""
    heads = set(study.directions.heads)
    return [head for head in study.ranking if head in heads]


def run(study: Study) -> Artefact:
    """Sweep strengths and numbers of heads on test questions.

    A second sweep, on validation questions, chooses the setting to report.
    """
    steering, heads = study.settings.steering, steerable(study)
    ks = possible(steering.ks, len(heads))
    grid = steering_settings(study.directions, heads, steering.alphas, ks)
    settings = [Setting("baseline"), *grid]
    validation = study.sweep(KEY, "validation", settings)
    test = study.sweep(KEY, "test", settings, steering.questions)
    lines, level = curves(test, "alpha"), {"all documents": test["baseline"].em}
    keep_curves(direction_curves(lines, level), study.folder(KEY) / "steering.png", lines, level)
    table, _ = chosen_table(validation, test, grid)
    figures = [
        (
            "Exact match by number k of heads for each strength alpha, with 95 % bootstrap intervals.",
            "steering.png",
        )
    ]
    losses = study.directions.losses
    if losses is not None:
        names = [str(head) for head in study.directions.heads]
        keep_figure(loss_curves(losses.numpy(), names), study.folder(KEY) / "losses.png")
        rows = [(epoch, *values) for epoch, values in enumerate(losses.tolist(), start=1)]
        write_csv(study.folder(KEY) / "losses.csv", ("epoch", *names), rows)
        figures.append(("Training loss of each head's direction: minus its contextual score.", "losses.png"))
    return Artefact(
        KEY,
        "Focus directions",
        "Figures 4, 7 and 8",
        tuple(_findings(validation, test, grid, steering.contextual)),
        tuple(figures),
        (table, sweep_table("Focus directions on test questions (baseline: no steering)", test)),
        (paper_values.FIGURE_4,),
    )


def _findings(validation: Sweep, test: Sweep, grid: list[Setting], contextual: int) -> list[Finding]:
    """Findings on the best positive strength, on the lowest and highest strength, and on too many heads."""
    positive = [setting for setting in grid if setting.parameters["alpha"] > 0]
    if not positive:
        return []
    chosen = best_setting(validation, positive)
    at_k = [setting for setting in grid if setting.parameters["k"] == chosen.parameters["k"]]
    least, most = (end(at_k, key=lambda setting: setting.parameters["alpha"]) for end in (min, max))
    findings = [
        Finding(
            f"A focus direction mitigates distraction: {chosen.name}, chosen on validation questions, gives "
            f"{test[chosen.name].em} on test questions ({compared(test, chosen.name)}). No steering gives "
            f"{test['baseline'].em}.",
            verdict_of(test, chosen.name, higher=True),
        )
    ]
    ends = [(least, "The opposite direction leads to more distraction")] if least.parameters["alpha"] < 0 else []
    if most is not chosen:
        ends.append((most, "Too strong a direction also distracts"))
    for setting, text in ends:
        verdict = verdict_of(test, setting.name, higher=False)
        findings.append(
            Finding(f"{text}: {setting.name} gives {test[setting.name].em} ({compared(test, setting.name)}).", verdict)
        )
    return [*findings, gain_of_more(test, positive, contextual, "Steering")]

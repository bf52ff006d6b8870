"""Figure 3: accuracy when the attention of contextual heads to the relevant document is turned up or down."""

from __future__ import annotations

from focuslens.evaluation import BASELINES, Setting, Sweep, split_softmax_settings
from focuslens.studies.paper import reported
from focuslens.studies.paper.artefact import Artefact, Finding, keep_curves, signed
from focuslens.studies.paper.choosing import chosen_table, difference, gain_of_more, possible, random_order, verdict_of
from focuslens.studies.paper.study import Study
from focuslens.viz import curves, split_softmax_curves, sweep_table

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "split_softmax"
SECTIONS = ("split_softmax",)
_CAPTION = (
    "Split-softmax on test questions (baseline: all documents; gold: the relevant one alone; negative: all others)"
)
_LITTLE = 0.05
"""Exact match that counts as little."""


def run(study: Study) -> Artefact:
    """Sweep exponents and numbers of heads on test questions; choose on validation questions."""
    wanted, ranking = study.settings.split_softmax, study.ranking
    ks = possible(wanted.ks, len(ranking))
    contextual = split_softmax_settings(ranking, wanted.taus, ks)
    others = random_order(ranking, min(wanted.exclude, len(ranking) // 2), study.settings.seed)
    random = split_softmax_settings(others, [wanted.random_tau], ks, label="random")
    test = study.sweep(KEY, "test", [*BASELINES, *contextual, *random])
    validation = study.sweep(KEY, "validation", [Setting("baseline"), *contextual])
    lines = curves(test, "tau", heads="contextual") + curves(test, "tau", heads="random")
    levels = {
        "all documents": test["baseline"].em,
        "relevant document only": test["gold"].em,
        "no relevant document": test["negative"].em,
    }
    keep_curves(split_softmax_curves(lines, levels), study.folder(KEY) / "split_softmax.png", lines, levels)
    chosen, honest = chosen_table(validation, test, contextual)
    return Artefact(
        KEY,
        "Split-softmax on contextual and on random heads",
        "Figure 3",
        tuple(_findings(study, test, honest, contextual, random)),
        (
            (
                "Exact match over the number k of heads for each exponent tau (below 1 attention to the relevant "
                "document is turned up, above 1 down), with 95 % bootstrap intervals; random heads are drawn outside "
                f"the first {min(wanted.exclude, len(ranking) // 2)} of the ranking as long as there are others.",
                "split_softmax.png",
            ),
        ),
        (chosen, sweep_table(_CAPTION, test)),
        (reported.FIGURE_3,),
    )


def _findings(
    study: Study, test: Sweep, honest: Setting, contextual: list[Setting], random: list[Setting]
) -> list[Finding]:
    k = honest.parameters["k"]
    found = [
        Finding(
            f"More attention to the relevant document repairs answers: {honest.name}, chosen on validation questions, "
            f"gives {test[honest.name].em} on test questions against {test['baseline'].em} without, and "
            f"{test['gold'].em} with the relevant document alone.",
            verdict_of(test, honest.name, higher=True),
        )
    ]
    lowered = [one for one in contextual if one.parameters["tau"] > 1 and one.parameters["k"] == k]
    if lowered:
        least = max(lowered, key=lambda one: one.parameters["tau"])
        found.append(
            Finding(
                f"Less attention destroys them: {least.name} gives {test[least.name].em}, where the prompt without the "
                f"relevant document gives {test['negative'].em}.",
                verdict_of(test, least.name, higher=False),
            )
        )
    raised = [one for one in contextual if one.parameters["tau"] < 1]
    found.append(gain_of_more(test, raised, study.settings.split_softmax.exclude, "Turning up"))
    excluded = min(study.settings.split_softmax.exclude, len(study.ranking) // 2)
    apart = [one for one in random if one.parameters["k"] <= min(k, len(study.ranking) - excluded)]
    if apart:
        most = max(apart, key=lambda one: one.parameters["k"])
        gap = difference(test, most.name)
        inside, outside = max(-gap.low, gap.high) <= _LITTLE, gap.low > _LITTLE or gap.high < -_LITTLE
        found.append(
            Finding(
                f"Random other heads matter little: {most.name} gives {test[most.name].em}, {signed(gap)} against the "
                f"baseline; little is {_LITTLE:g} either way.",
                "holds" if inside else "does not hold" if outside else "cannot be told",
            )
        )
    return found

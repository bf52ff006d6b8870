"""Figure 3: accuracy when contextual heads attend more, or less, to the relevant document."""

from __future__ import annotations

from focuslens.evaluation import BASELINES, Setting, Sweep, split_softmax_settings
from focuslens.studies.paper import paper_values
from focuslens.studies.paper.artefact import Artefact, Finding, keep_curves, signed
from focuslens.studies.paper.chosen_settings import (
    chosen_table,
    compared,
    difference,
    gain_of_more,
    possible,
    random_order,
    verdict_of,
)
from focuslens.studies.paper.study import Study
from focuslens.viz import Table, curves, split_softmax_curves, sweep_table

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "split_softmax"
SECTIONS = ("split_softmax",)
_CAPTION = "Split-softmax on test questions"
_CASES = "baseline: all documents; gold: only the relevant one; negative: only the others"
_ALL = f"The three cases on all test questions ({_CASES}). The sweep below has the first of them"
_LITTLE = 0.05
"""Maximum change of exact match that counts as little."""


def run(study: Study) -> Artefact:
    """Sweep exponents and numbers of heads on test questions.

    A second sweep, on validation questions, chooses the setting to report. It runs first.
    """
    settings, ranking = study.settings.split_softmax, study.ranking
    ks = possible(settings.ks, len(ranking))
    contextual = split_softmax_settings(ranking, settings.taus, ks)
    others = random_order(ranking, min(settings.exclude, len(ranking) // 2), study.settings.seed)
    random = split_softmax_settings(others, [settings.random_tau], ks, label="random")
    validation = study.sweep(KEY, "validation", [Setting("baseline"), *contextual])
    few = settings.questions
    whole = study.sweep(KEY, "test", BASELINES) if few is not None else None
    test = study.sweep(KEY, "test", [*(BASELINES if few is None else [Setting("baseline")]), *contextual, *random], few)
    cases = test if whole is None else whole
    lines = curves(test, "tau", heads="contextual") + curves(test, "tau", heads="random")
    levels = {
        "all documents": cases["baseline"].em,
        "relevant document only": cases["gold"].em,
        "no relevant document": cases["negative"].em,
    }
    keep_curves(split_softmax_curves(lines, levels), study.folder(KEY) / "split_softmax.png", lines, levels)
    table, chosen = chosen_table(validation, test, contextual)
    return Artefact(
        KEY,
        "Split-softmax on contextual and on random heads",
        "Figure 3",
        tuple(_findings(study, test, cases, chosen, contextual, random)),
        (
            (
                "Exact match by number k of heads for each exponent tau, with 95 % bootstrap intervals. tau below 1 "
                "raises attention to the relevant document, and tau above 1 lowers it. Random heads are not among the "
                f"first {min(settings.exclude, len(ranking) // 2)} of the ranking, unless k is too large for that.",
                "split_softmax.png",
            ),
        ),
        (table, *_sweep_tables(test, whole)),
        (paper_values.FIGURE_3,),
    )


def _sweep_tables(test: Sweep, whole: Sweep | None) -> tuple[Table, ...]:
    """The table of the sweep, after a table of the three cases if these ran on more questions."""
    if whole is None:
        return (sweep_table(f"{_CAPTION} ({_CASES})", test),)
    return sweep_table(_ALL, whole), sweep_table(_CAPTION, test)


def _findings(
    study: Study, test: Sweep, cases: Sweep, chosen: Setting, contextual: list[Setting], random: list[Setting]
) -> list[Finding]:
    k = chosen.parameters["k"]
    findings = [
        Finding(
            f"More attention to the relevant document repairs answers: {chosen.name}, chosen on validation questions, "
            f"gives {test[chosen.name].em} on test questions ({compared(test, chosen.name)}). No intervention gives "
            f"{test['baseline'].em}, and the relevant document alone gives {cases['gold'].em}.",
            verdict_of(test, chosen.name, higher=True),
        )
    ]
    lowered = [setting for setting in contextual if setting.parameters["tau"] > 1 and setting.parameters["k"] == k]
    if lowered:
        least = max(lowered, key=lambda setting: setting.parameters["tau"])
        findings.append(
            Finding(
                f"Less attention to the relevant document destroys answers: {least.name} gives {test[least.name].em} "
                f"({compared(test, least.name)}). "
                f"The prompt without the relevant document gives {cases['negative'].em}.",
                verdict_of(test, least.name, higher=False),
            )
        )
    raised = [setting for setting in contextual if setting.parameters["tau"] < 1]
    findings.append(gain_of_more(test, raised, study.settings.split_softmax.exclude, "Turning up"))
    excluded = min(study.settings.split_softmax.exclude, len(study.ranking) // 2)
    largest_k = min(k, len(study.ranking) - excluded)
    without_contextual = [setting for setting in random if setting.parameters["k"] <= largest_k]
    if without_contextual:
        most = max(without_contextual, key=lambda setting: setting.parameters["k"])
        gap = difference(test, most.name)
        inside, outside = max(-gap.low, gap.high) <= _LITTLE, gap.low > _LITTLE or gap.high < -_LITTLE
        findings.append(
            Finding(
                f"Random other heads matter little: {most.name} gives {test[most.name].em}, a change of {signed(gap)} "
                f"from the baseline ({compared(test, most.name)}). The limit for little is {_LITTLE:g} in both "
                "directions.",
                "holds" if inside else "does not hold" if outside else "cannot be told",
            )
        )
    return findings

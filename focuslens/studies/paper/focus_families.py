"""Methods in the table of focus without a label, each with a grid of settings for validation questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from focuslens.evaluation import Setting, steering_settings
from focuslens.evaluation.methods import ContextAwareDecoding, DocumentFilter, DySCO, SelfElicit
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.interventions import (
    LogitBias,
    Pasta,
    PositionCalibration,
    RandomFocus,
    SelfFocus,
    SplitSoftmax,
    SpotLight,
    TargetedSplitSoftmax,
    TargetedSteering,
)
from focuslens.studies.paper.chosen_settings import possible
from focuslens.studies.paper.focus_choice import Choosers
from focuslens.studies.paper.settings import FocusSettings

__all__ = ["Extra", "Family", "control", "of_others", "of_self_focus", "refined", "with_label"]

Extra: TypeAlias = Literal["nothing", "question rows", "a second answer", "a second prompt", "two passes a token"]
"""Work beside one run of the prompt and its answer."""

_ON_CHOICE = "choice"
"""Name of the sweep of methods that wait for the choice of the best self-focus."""


@dataclass(frozen=True)
class Family:
    """A method and its settings.

    Attributes:
        name: Name of the method in tables.
        settings: Settings of which validation questions choose one.
        extra: Work beside one run of the prompt and its answer.
        label: Whether the method is told the gold document.
        own: Whether the method is one of this package.
        sweep: Name of the sweep. Families of one sweep share a run of the prompts, if their settings allow it.
    """

    name: str
    settings: tuple[Setting, ...]
    extra: Extra = "nothing"
    label: bool = False
    own: bool = False
    sweep: str = "attention"

    @property
    def is_self_focus(self) -> bool:
        """Whether the method is self-focus with an edit of this package."""
        chooses = any(isinstance(item, SelfFocus) for setting in self.settings for item in setting.interventions)
        return self.own and chooses


def _grid(name: str, options: Sequence[tuple[str, Sequence[Intervention]]]) -> tuple[Setting, ...]:
    return tuple(
        Setting(f"{name}, {text}" if text else name, tuple(items), parameters={"method": name, "setting": text})
        for text, items in options
    )


def _by_method(name: str, options: Sequence[tuple[str, Any]]) -> tuple[Setting, ...]:
    return tuple(
        Setting(f"{name}, {text}" if text else name, parameters={"method": name, "setting": text}, method=method)
        for text, method in options
    )


def with_label(settings: FocusSettings, ranking: Sequence[Head]) -> list[Family]:
    """Methods that are told the gold document: how much there is to gain."""
    ks = possible(settings.ks, len(ranking))
    split = [(f"tau={t:g} k={k}", [SplitSoftmax(ranking[:k], t)]) for t in settings.taus for k in ks]
    return [
        Family("split-softmax on the gold document", _grid("label: split-softmax", split), label=True, own=True),
        Family(
            "logit bias on the gold document",
            _grid("label: logit bias", [(f"bias={b:g}", [LogitBias(None, b)]) for b in settings.biases]),
            label=True,
        ),
        Family(
            "PASTA on the gold document",
            _grid(
                "label: PASTA",
                [(f"alpha={a:g} k={k}", [Pasta(ranking[:k], a)]) for a in settings.scales for k in ks],
            ),
            label=True,
            sweep="pasta",
        ),
    ]


def of_self_focus(settings: FocusSettings, ranking: Sequence[Head], chosen: Choosers) -> list[Family]:
    """Self-focus: heads or votes choose, and contextual heads are focused."""
    ks = possible(settings.ks, len(ranking))

    def grid(name: str, by: Any, **more: Any) -> tuple[Setting, ...]:
        options = [
            (f"tau={t:g} k={k}", [SelfFocus(by, t, focused=ranking[:k], **more)]) for t in settings.taus for k in ks
        ]
        return _grid(name, options)

    heads, votes, answer = chosen.heads.by, chosen.votes.by, chosen.answer.by
    return [
        Family("self-focus by heads", grid("self-focus by heads", heads), "question rows", own=True),
        Family("self-focus by votes", grid("self-focus by votes", votes), "question rows", own=True),
        Family(
            "self-focus by votes, soft", grid("soft self-focus", votes, top=None, soft=True), "question rows", own=True
        ),
        Family(
            "self-focus by votes of a first answer",
            grid("self-focus by an answer", answer, rows="response"),
            "a second answer",
            own=True,
        ),
    ]


def refined(settings: FocusSettings, best: SelfFocus, extra: Extra) -> list[Family]:
    """Variants of the best self-focus on validation questions: a gate, a strength for each prompt, two documents."""
    assert best.focused is not None
    gates = [(f"margin={m:g}", [_changed(best, min_margin=m)]) for m in settings.margins]
    masses = [
        (f"mass={m:g}", [_changed(best, tau=None, focused=None, edit=TargetedSplitSoftmax(best.focused, m))])
        for m in settings.masses
    ]
    return [
        Family("self-focus with a gate", _grid("gated self-focus", gates), extra, own=True, sweep=_ON_CHOICE),
        Family(
            "self-focus with a strength for each prompt",
            _grid("self-focus to a mass", masses),
            extra,
            own=True,
            sweep=_ON_CHOICE,
        ),
        Family(
            "self-focus on two documents",
            _grid("self-focus on two", [("", [_changed(best, top=2)])]),
            extra,
            own=True,
            sweep=_ON_CHOICE,
        ),
    ]


def _changed(focus: SelfFocus, **changes: Any) -> SelfFocus:
    return replace(focus, **{"soft": False, **changes})


def of_others(
    settings: FocusSettings,
    ranking: Sequence[Head],
    chosen: Choosers,
    best: SelfFocus,
    extra: Extra,
    directions: Sequence[tuple[str, Any]],
    sink: float,
) -> list[Family]:
    """Methods of others, on the document that self-focus chooses where they need a span.

    Args:
        settings: The grids.
        ranking: All heads, by contextual score.
        chosen: Heads and votes that choose.
        best: The best self-focus on validation questions, for the choice.
        extra: Work of this choice.
        directions: Names of focus directions, and the directions.
        sink: Mean mass on the sink, in the row of the last prompt token, of the heads that are steered.
    """
    ks = possible(settings.ks, len(ranking))
    ranked = chosen.heads.by if isinstance(chosen.heads.by, tuple) else chosen.heads.by.heads

    def on_choice(edit: Any) -> list[Intervention]:
        return [_changed(best, tau=None, focused=None, edit=edit)]

    calibration = PositionCalibration(dummies="all")
    if settings.dummy is not None:
        calibration = replace(calibration, dummy=settings.dummy)
    families = [
        Family(
            "logit bias on the chosen document (InstABoost)",
            _grid("logit bias", [(f"bias={b:g}", on_choice(LogitBias(None, b))) for b in settings.biases]),
            extra,
            sweep=_ON_CHOICE,
        ),
        Family(
            "SpotLight on the chosen document",
            _grid(
                "SpotLight",
                [(f"target={t:g}", on_choice(SpotLight(t, positions="response"))) for t in settings.targets],
            ),
            extra,
            sweep=_ON_CHOICE,
        ),
        Family(
            "PASTA on the chosen document",
            _grid(
                "PASTA",
                [
                    (f"alpha={a:g} k={k}", on_choice(Pasta(ranking[:k], a, positions="response")))
                    for a in settings.scales
                    for k in ks
                ],
            ),
            extra,
            sweep=_ON_CHOICE,
        ),
        Family(
            "position calibration (found in the middle)",
            _grid(
                "position calibration",
                [(f"t={t:g}", [replace(calibration, temperature=t)]) for t in settings.temperatures],
            ),
            "a second prompt",
            sweep=_ON_CHOICE,
        ),
        Family(
            "filter of documents (CAFE)",
            _by_method(
                "filter",
                [(f"top={n}", DocumentFilter(ranked, n)) for n in settings.kept]
                + [(f"top={n} steered", DocumentFilter(ranked, n, steer=0.01)) for n in settings.kept],
            ),
            "a second prompt",
            sweep="filter",
        ),
        Family("SelfElicit", _by_method("SelfElicit", [("", SelfElicit())]), "a second prompt", sweep="SelfElicit"),
        Family(
            "context-aware decoding (CAD)",
            _by_method("CAD", [(f"alpha={a:g}", ContextAwareDecoding(a)) for a in settings.contrasts]),
            "a second prompt",
            sweep="contrast",
        ),
        Family("AdaCAD", _by_method("AdaCAD", [("", ContextAwareDecoding(None))]), "a second prompt", sweep="contrast"),
        Family(
            "DySCO",
            _by_method("DySCO", [(f"strength={s:g}", DySCO(ranked, strength=s)) for s in settings.strengths]),
            "two passes a token",
            sweep="DySCO",
        ),
    ]
    for name, vectors in directions:
        is_own = vectors.rank > 0
        families.append(Family(name, _steered(name, vectors, ranking, settings), own=is_own, sweep="steering"))
    if directions:
        families.append(_to_a_sink(*directions[0], ranking[: max(settings.steered)], settings, sink))
    return [family for family in families if family.name not in settings.leave_out]


def _steered(name: str, vectors: Any, ranking: Sequence[Head], settings: FocusSettings) -> tuple[Setting, ...]:
    known = [head for head in ranking if head in set(vectors.heads)]
    grid = steering_settings(vectors, known, settings.alphas, possible(settings.steered, len(known)))
    return tuple(
        replace(setting, name=f"{name}, {setting.name}", parameters={"method": name, "setting": setting.name})
        for setting in grid
    )


def _to_a_sink(name: str, vectors: Any, heads: Sequence[Head], settings: FocusSettings, sink: float) -> Family:
    known = [head for head in heads if head in set(vectors.heads)]
    alphas = (0.0, *settings.alphas)
    options = [
        (f"sink={share:g} of {sink:.2f}", [TargetedSteering(vectors, share * sink, known, alphas=alphas)])
        for share in settings.sink
    ]
    label = f"{name}, a strength for each prompt"
    return Family(label, _grid(label, options), own=True, sweep="targeted steering")


def control(settings: Setting, seed: int) -> Setting:
    """The setting of self-focus with a random document in place of the chosen one."""
    (focus,) = settings.interventions
    assert isinstance(focus, SelfFocus)
    assert focus.tau is not None
    assert focus.heads is not None
    drawn = RandomFocus(focus.heads, focus.tau, seed=seed)
    return Setting("random document", (drawn,), parameters={"method": "random document", "setting": settings.name})

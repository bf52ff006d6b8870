"""Settings of a sweep, and ways of answering that are more than interventions on one run of the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from focuslens.hooks import Intervention, checked_interventions
from focuslens.prompts.sample import Case
from focuslens.util.checks import checked_text

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel
    from focuslens.model.generation import Generation
    from focuslens.prompts.batch import PromptBatch

__all__ = ["Method", "Setting"]


@runtime_checkable
class Method(Protocol):
    """Immutable description of a way of answering, for the ``method`` of a :class:`Setting`.

    A method may write the prompts anew, run them more than once, or choose tokens in another way. Methods are picklable
    and have the methods below.
    """

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the method as JSON values, for result files."""
        ...

    def respond(
        self,
        model: FocusModel,
        batch: PromptBatch,
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 100,
    ) -> list[Generation]:
        """One response per prompt of a batch, with interventions on the runs that generate."""
        ...


@dataclass(frozen=True)
class Setting:
    """Setting to evaluate: interventions and the case of the prompts.

    Attributes:
        name: Name of the setting, unique within the sweep.
        interventions: Interventions, applied in order. A baseline has no interventions.
        case: Case of the prompts: ``long``, ``gold`` or ``negative``.
        parameters: Parameters that the sweep varies, such as ``{"tau": 0.3, "k": 20}``. They become columns of tables.
        method: Way of answering, such as :class:`SelfElicit`; ``None`` for plain generation.
    """

    name: str
    interventions: tuple[Intervention, ...] = ()
    case: Case = "long"
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    method: Method | None = None

    def __post_init__(self) -> None:
        checked_text(self.name, "name")
        # A class has the methods of its instances.
        is_class = isinstance(self.method, type)
        if is_class or not isinstance(self.method, Method | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"method is {self.method!r:.80}; it must be a way of answering, such as fl.SelfElicit()")
        object.__setattr__(self, "interventions", checked_interventions(self.interventions))

    def describe(self) -> dict[str, Any]:
        """Description of the setting as JSON values, for result files."""
        described = {
            "name": self.name,
            "case": self.case,
            "parameters": dict(self.parameters),
            "interventions": [intervention.describe() for intervention in self.interventions],
        }
        return described if self.method is None else {**described, "method": self.method.describe()}

"""Found in the middle: attention to documents by their relevance, without the bias of their positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.hooks import Cursor, Hook, HookTarget, PromptLike
from focuslens.interventions.base import require_prompt
from focuslens.interventions.redistribution import Redistribution, ShareOf
from focuslens.interventions.rescaling import pattern_hooks
from focuslens.model.question_rows import question_attention, variant_attention
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.prompt import Span
from focuslens.prompts.rewriting import Edit
from focuslens.util.checks import checked_integer, checked_number, checked_text
from focuslens.util.frames import SHARE, rows_frame

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel
    from focuslens.model.generation import Prefix

__all__ = ["CalibratedAttention", "Dummies", "PositionCalibration"]

Dummies: TypeAlias = Literal["one", "all"]
"""Documents that are dummies in a further prompt: ``one`` after the other, or ``all`` in a single prompt."""

LOREM = "Lorem ipsum dolor sit amet, consectetur adipiscing elit."


@dataclass(frozen=True)
class CalibratedAttention:
    """Attention from the last prompt token to each document, per token of the document.

    All values are means over the tokens of a document, over all heads and over all layers.

    Attributes:
        documents: Token ranges of the documents.
        attention: Attention to each document.
        bias: Attention to a dummy in the place of each document.
        shares: Softmax of ``(attention - bias) / temperature``.
    """

    documents: tuple[Span, ...]
    attention: tuple[float, ...]
    bias: tuple[float, ...]
    shares: tuple[float, ...]

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per document: its token range, attention, bias and share."""
        columns = zip(self.documents, self.attention, self.bias, self.shares, strict=True)
        rows = [
            {"document": i, "start": start, "end": end, "attention": attention, "bias": bias, "share": share}
            for i, ((start, end), attention, bias, share) in enumerate(columns)
        ]
        per_token = f"{SHARE}, per token"
        units = {"attention": per_token, "bias": per_token, "share": "share of all documents, 0 to 1"}
        return rows_frame(rows, units, ("document", "start", "end", "attention", "bias", "share"))


@dataclass(frozen=True)
class PositionCalibration:
    r"""Found in the middle: attention to documents by their calibrated relevance (Hsieh et al., 2024).

    :math:`A_k` is the attention from the last prompt token to document :math:`k`, averaged over the document's tokens,
    all heads and all layers. :math:`B_k` is the same for a dummy, a text without information in the place of the
    document. The relevance is :math:`A_k - B_k`, and the shares are :math:`\alpha = \mathrm{softmax}((A - B) / t)`. In
    the last layers, in all heads, the weight of each token of document :math:`k` is multiplied by :math:`C \alpha_k /
    A_k`, where :math:`C` keeps the row's total attention to documents. Other tokens keep their weights. The hook point
    is ``hook_pattern``.

    The prompts are run once with a dummy in the place of each document (``dummies="one"``), over the keys and values
    that they share with the prompt. The paper leaves these choices open:

    - Rows: only rows that produce the response change, so that the measurement precedes the edit.
    - The denominator :math:`A_k`: ``relative_to="mean"`` takes the mean above, so that differences between heads and
      rows remain. ``relative_to="row"`` takes the same mean over tokens in the row and head itself, so that
      documents' attention per token is proportional to :math:`\alpha` in each of them.
    - The text of the dummy, and its length: it is repeated up to about the number of characters of the document.
    - A token of two documents counts for the first. A document without any attention keeps none.

    Args:
        temperature: The temperature :math:`t`, above 0. It is 5e-5 in the paper.
        layers: Number of the last layers to change, 16 in the paper. A model with fewer layers changes all.
        dummy: Text of the dummy.
        repeated: Whether the dummy is repeated to the length of the document.
        dummies: ``one`` for a further prompt per document, as in the paper. ``all`` is a cheaper variant: one further
            prompt in which all documents are dummies.
        relative_to: Denominator: ``mean`` or ``row``.
    """

    temperature: float = 5e-5
    layers: int = 16
    dummy: str = LOREM
    repeated: bool = True
    dummies: Dummies = "one"
    relative_to: ShareOf = "mean"

    def __post_init__(self) -> None:
        temperature, layers = checked_number(self.temperature, "temperature"), checked_integer(self.layers, "layers")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature is {temperature}; it must be a finite number above 0")
        if layers < 1:
            raise ValueError(f"layers is {layers}; it must be at least 1")
        for name, kinds in (("dummies", get_args(Dummies)), ("relative_to", get_args(ShareOf))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(kinds)}")
        checked_text(self.dummy, "dummy", may_be_empty=False)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "layers", layers)

    @property
    def heads(self) -> tuple[Head, ...] | None:
        """Always ``None``, because all heads of the last layers change."""
        return None

    @property
    def changes_prompt(self) -> bool:
        """Always ``False``, because only the rows that produce the response change."""
        return False

    def describe(self) -> dict[str, Any]:
        """Kind and settings of the intervention as JSON values."""
        return {
            "kind": "position_calibration",
            "temperature": self.temperature,
            "layers": self.layers,
            "dummy": self.dummy,
            "repeated": self.repeated,
            "dummies": self.dummies,
            "relative_to": self.relative_to,
        }

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        """TransformerLens hooks for one prompt, or for a batch padded on the left.

        The prompts and their variants with dummies are run first, without other interventions.
        :meth:`FocusModel.generate`, sweeps and evaluations measure with the run that they generate from, so there the
        attention is that of a prompt which other interventions may have changed.

        Raises:
            ValueError: If the prompt is missing or has no text, or as for :meth:`SplitSoftmax.hooks`.
            KeyError: If the prompt has no span ``document``.
            TypeError: If ``model`` is not a :class:`FocusModel`.
        """
        if not hasattr(model, "prefill"):
            raise TypeError(
                "position calibration runs the model to measure, so it needs a FocusModel, not a "
                f"{type(model).__name__}"
            )
        runner = cast("FocusModel", model)
        prefix = runner.prefill(require_prompt(model, prompt, "position calibration"), hold_last=True)
        batch, calibrated = self.resolve(runner, prefix)
        return calibrated.hooks(model, batch, cursor=cursor)

    def resolve(self, model: FocusModel, prefix: Prefix, max_new_tokens: int = 100) -> tuple[PromptBatch, _Calibrated]:
        """Measure the attention to documents and dummies.

        Args:
            model: The model.
            prefix: Prefix of the prompts.
            max_new_tokens: Maximum length of a response, which does not matter.

        Returns:
            The prompts, and the intervention with the measured attention.
        """
        measured = self.measure(model, prefix)
        prompts = prefix.batch.prompts
        return prefix.batch, _Calibrated(self, {_key(p): item for p, item in zip(prompts, measured, strict=True)})

    def measure(self, model: FocusModel, prefix: Prefix) -> list[CalibratedAttention]:
        """Attention to the documents of each prompt of a prefix, and to dummies in their places.

        Raises:
            ValueError: If the text of a prompt is unknown.
            KeyError: If a prompt has no span ``document``.
        """
        batch, heads = (
            prefix.batch,
            [Head(i, j) for i in range(model.shape.n_layers) for j in range(model.shape.n_heads)],
        )
        own = [prompt.resolve("document") for prompt in batch.prompts]
        attention = question_attention(model, prefix, heads, "last").attention.double().mean(dim=1)
        plain = [_means(row, n, spans) for row, n, spans in zip(attention, batch.padding, own, strict=True)]
        bias = [torch.zeros(len(spans), dtype=torch.float64) for spans in own]
        for chosen in self._rounds(max(len(spans) for spans in own)):
            variants = [self._with_dummies(model, prompt, chosen) for prompt in batch.prompts]
            read = variant_attention(model, prefix, heads, "last", variants).double().mean(dim=1)
            for i, (variant, padding) in enumerate(zip(variants, batch.padding, strict=True)):
                of_dummies = _means(read[i], padding, variant.resolve("document"))
                places = [k for k in chosen if k < len(own[i])]
                bias[i][places] = of_dummies[places]
        return [self._calibrated(*values) for values in zip(own, plain, bias, strict=True)]

    def _rounds(self, n_documents: int) -> list[Sequence[int]]:
        """Documents that are dummies in each further run."""
        if self.dummies == "all":
            return [range(n_documents)] if n_documents else []
        return [[k] for k in range(n_documents)]

    def _with_dummies(self, model: FocusModel, prompt: EncodedPrompt, documents: Sequence[int]) -> EncodedPrompt:
        """The prompt with dummies in the places of documents, as far as it has them."""
        spans = prompt.characters.get("document", ())
        if len(spans) != len(prompt.resolve("document")):
            raise ValueError(
                "the text of a prompt is unknown, so its documents cannot be replaced by dummies; give "
                "sample.prompt(), or fl.Prompt(text, spans={'document': [(start, end), ...]}) with character positions"
            )
        chosen = [spans[k] for k in documents if k < len(spans)]
        return model.encoder.rewritten(prompt, [Edit(start, end, self._dummy(end - start)) for start, end in chosen])

    def _dummy(self, n_characters: int) -> str:
        copies = max(1, round((n_characters + 1) / (len(self.dummy) + 1))) if self.repeated else 1
        return " ".join([self.dummy] * copies)

    def _calibrated(
        self, documents: tuple[Span, ...], attention: Float[Tensor, "part"], bias: Float[Tensor, "part"]
    ) -> CalibratedAttention:
        shares = torch.softmax((attention - bias) / self.temperature, dim=0)
        return CalibratedAttention(documents, *(tuple(x.tolist()) for x in (attention, bias, shares)))


def _means(attention: Float[Tensor, "column"], padding: int, spans: Sequence[Span]) -> Float[Tensor, "part"]:
    """Mean attention to the tokens of each span."""
    means = [attention[padding + start : padding + end].mean() for start, end in spans]
    return torch.stack(means) if means else attention.new_zeros(0)


def _key(prompt: EncodedPrompt) -> tuple[Any, ...]:
    """Tokens and documents of a prompt, which its measured attention depends on."""
    return tuple(prompt.tokens.tolist()), prompt.resolve("document")


@dataclass(frozen=True, eq=False)
class _Calibrated:
    """Position calibration with the measured attention of each prompt."""

    settings: PositionCalibration
    measured: Mapping[tuple[Any, ...], CalibratedAttention]

    heads = None
    changes_prompt = False

    def describe(self) -> dict[str, Any]:
        return self.settings.describe()

    def hooks(self, model: HookTarget, prompt: PromptLike | None = None, *, cursor: Cursor | None = None) -> list[Hook]:
        batch, settings = require_prompt(model, prompt, "position calibration"), self.settings
        measured = [self.measured[_key(item)] for item in batch.prompts]
        edit = Redistribution(
            batch,
            [item.documents for item in measured],
            [_log_weights(item, settings) for item in measured],
            settings.relative_to,
        )
        n_layers = model.shape.n_layers
        layers = range(max(0, n_layers - settings.layers), n_layers)
        hooks = pattern_hooks(model, batch, dict.fromkeys(layers, edit), "response", cursor)
        model.require_acting(name for name, _ in hooks)
        return hooks


def _log_weights(measured: CalibratedAttention, settings: PositionCalibration) -> Float[Tensor, "part"]:
    """Logarithm of ``alpha_k / A_k``, or of ``alpha_k`` if each row has a denominator of its own."""
    attention, bias = (torch.tensor(x, dtype=torch.float64) for x in (measured.attention, measured.bias))
    shares = torch.log_softmax((attention - bias) / settings.temperature, dim=0)
    if settings.relative_to == "row":
        return shares
    return torch.where(attention > 0, shares - torch.log(attention), -torch.inf)

"""Reference models for the parity tests: Hugging Face models that use no code of FocusLens.

The prompt template is written out again, and spans are found with ``str.find``. A separate eager attention
implementation allows edits of rotated queries, rotated keys and the attention pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

if TYPE_CHECKING:
    from focuslens import MultiDocSample

__all__ = [
    "Edits",
    "ReferenceModel",
    "add_to_rows",
    "document_ranges",
    "gap",
    "largest",
    "prompt_text",
    "scores_of_rows",
    "split_softmax_rows",
    "tokens_of_ranges",
]

INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)

Rows: TypeAlias = Callable[[int, Tensor, int], Tensor]
"""Edit of a tensor: ``(layer, tensor [batch head row ...], position of the first row) -> tensor``."""


def largest(difference: Tensor) -> float:
    """Largest absolute value of a tensor."""
    return float(difference.detach().abs().max())


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference of two tensors of the same shape."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return largest(actual.double() - expected.double())


def prompt_text(sample: MultiDocSample, case: str) -> str:
    """The multi-document prompt of the paper, built without FocusLens."""
    shown = {
        "long": range(len(sample.documents)),
        "gold": [sample.gold_index],
        "negative": [i for i in range(len(sample.documents)) if i != sample.gold_index],
    }[case]
    lines = [
        f"Document [{i + 1}](Title: {sample.documents[i].title}) {sample.documents[i].text}"
        for i in cast("Sequence[int]", shown)
    ]
    return INSTRUCTION + "\n\n" + "\n".join(lines) + f"\n\nQuestion: {sample.question}\nAnswer:"


def document_ranges(sample: MultiDocSample, text: str) -> dict[int, tuple[int, int]]:
    """Document index to the document's character range in ``text``, found by string search."""
    found: dict[int, tuple[int, int]] = {}
    for index, document in enumerate(sample.documents):
        needle = f"(Title: {document.title}) {document.text}"
        assert text.count(needle) <= 1
        if (start := text.find(needle)) >= 0:
            found[index] = (start, start + len(needle))
    return found


def tokens_of_ranges(offsets: Sequence[tuple[int, int]], characters: tuple[int, int]) -> list[int]:
    """Tokens that contain at least one character of a range, found character by character."""
    wanted = set(range(*characters))
    return [i for i, (start, end) in enumerate(offsets) if wanted.intersection(range(start, end))]


def scores_of_rows(hf: ReferenceModel, sample: MultiDocSample, case: str, rows: Tensor) -> dict[str, Tensor]:
    """The four contextual scores ``[layer head]`` (equation 1) from attention ``[layer head row key]``.

    The rows are those of the response, and the keys those of the prompt and of the response.
    """
    prompt = prompt_text(sample, case)
    offsets, rows = hf.offsets(prompt), rows.double()

    def score(tokens: list[int]) -> Tensor:
        return rows[..., tokens].sum(dim=-1).mean(dim=-1)

    documents = {
        index: score(tokens_of_ranges(offsets, characters))
        for index, characters in document_ranges(sample, hf.text(prompt)).items()
    }
    nothing = torch.zeros_like(score([0]))
    others = [documents[index] for index in documents if index != sample.gold_index]
    return {
        "relevant": documents.get(sample.gold_index or 0, nothing) if case != "negative" else nothing,
        "irrelevant": sum(others, start=nothing),
        "irrelevant_max": torch.stack(others).amax(dim=0) if others else nothing,
        "sink": score([0, 1]),
    }


@dataclass(frozen=True)
class Edits:
    """Edits inside every attention layer. Keys are already repeated, one per query head."""

    query: Rows | None = None
    key: Rows | None = None
    pattern: Rows | None = None


class _State:
    """State that the attention modules of one reference model share."""

    def __init__(self) -> None:
        self.edits = Edits()
        self.patterns: dict[int, Tensor] | None = None


def _reference_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention on rotated queries and keys, with the edits of the module's reference model."""
    state: _State = module.reference_state
    layer, group = int(module.layer_idx), query.shape[1] // key.shape[1]
    first = key.shape[2] - query.shape[2]
    keys = torch.stack([key[:, head // group] for head in range(query.shape[1])], dim=1)
    values = torch.stack([value[:, head // group] for head in range(query.shape[1])], dim=1)
    if state.edits.query is not None:
        query = state.edits.query(layer, query, first)
    if state.edits.key is not None:
        keys = state.edits.key(layer, keys, 0)
    scores = query @ keys.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : keys.shape[2]]
    if s_aux is None:
        pattern = scores.softmax(dim=-1)
    else:  # written out, one head at a time: the sink is a term of the sum
        heads: list[Tensor] = []
        for head, sink in enumerate(s_aux.double()):
            exact = scores[:, head].double()
            largest = torch.maximum(exact.amax(dim=-1, keepdim=True), sink)
            terms = (exact - largest).exp()
            heads.append(terms / (terms.sum(dim=-1, keepdim=True) + (sink - largest).exp()))
        pattern = torch.stack(heads, dim=1).to(scores.dtype)
    if state.edits.pattern is not None:
        pattern = state.edits.pattern(layer, pattern, first)
    if state.patterns is not None:
        state.patterns[layer] = pattern
    return (pattern @ values).transpose(1, 2).contiguous(), pattern


AttentionInterface.register("parity_reference", _reference_attention)
AttentionMaskInterface.register("parity_reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


class ReferenceModel:
    """A Hugging Face checkpoint with its original eager attention (``eager``) and with editable attention (``hf``)."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer: Any = cast("Any", AutoTokenizer).from_pretrained(directory)
        self.state = _State()
        self._directory, self._dtype = directory, dtype
        self._generated: dict[tuple[int, ...], list[int]] = {}

    @cached_property
    def eager(self) -> Any:
        load: Any = cast("Any", AutoModelForCausalLM).from_pretrained
        return load(self._directory, attn_implementation="eager", dtype=self._dtype).eval()

    @cached_property
    def hf(self) -> Any:
        load: Any = cast("Any", AutoModelForCausalLM).from_pretrained
        model = load(self._directory, attn_implementation="parity_reference", dtype=self._dtype).eval()
        for layer in model.model.layers:
            layer.self_attn.reference_state = self.state
        return model

    @property
    def chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    def text(self, prompt: str) -> str:
        """Text to tokenize: the prompt, inside the chat template if the tokenizer has one."""
        if not self.chat:
            return prompt
        turn = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def ids(self, prompt: str) -> Tensor:
        """Token ids of a prompt from Hugging Face's tokenizer, ``[pos]``."""
        if not self.chat:
            return torch.tensor(self.tokenizer(prompt)["input_ids"])
        turn = [{"role": "user", "content": prompt}]
        encoded = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
        return torch.tensor(encoded["input_ids"])

    def offsets(self, prompt: str) -> list[tuple[int, int]]:
        """Character range in :meth:`text` of each token."""
        encoded = self.tokenizer(self.text(prompt), add_special_tokens=not self.chat, return_offsets_mapping=True)
        assert encoded["input_ids"] == self.ids(prompt).tolist()
        return encoded["offset_mapping"]

    @contextmanager
    def edited(self, edits: Edits) -> Generator[None]:
        """Context in which ``hf`` applies the edits."""
        self.state.edits = edits
        try:
            yield
        finally:
            self.state.edits = Edits()

    def logits(self, tokens: Tensor, edits: Edits | None = None) -> Tensor:
        """Logits ``[pos d_vocab]`` without a cache: of ``hf`` if there are edits, else of ``eager``."""
        with torch.no_grad():
            if edits is None:
                return self.eager(tokens[None], use_cache=False).logits[0]
            with self.edited(edits):
                return self.hf(tokens[None], use_cache=False).logits[0]

    def patterns(self, tokens: Tensor, edits: Edits | None = None) -> Tensor:
        """Attention patterns ``[layer head row key]`` without a cache."""
        with torch.no_grad():
            if edits is None:
                return torch.cat(self.eager(tokens[None], use_cache=False, output_attentions=True).attentions)
            self.state.patterns = {}
            try:
                self.logits(tokens, edits)
                return torch.cat([self.state.patterns[layer] for layer in sorted(self.state.patterns)])
            finally:
                self.state.patterns = None

    def pattern_rows(self, tokens: Tensor, first: int) -> Tensor:
        """Rows of ``eager``'s attention patterns from position ``first`` on, ``[layer head row key]``.

        Only one layer's full pattern is in memory at a time.
        """
        rows: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            rows.append(output[1][0, :, first:].clone())

        with ExitStack() as stack, torch.no_grad():
            for layer in self.eager.model.layers:
                stack.callback(layer.self_attn.register_forward_hook(keep).remove)
            self.eager(tokens[None], use_cache=False, logits_to_keep=1)
        return torch.stack(rows)

    @contextmanager
    def biased(self, biases: dict[str, dict[tuple[int, int], Tensor]]) -> Generator[None]:
        """Context in which ``eager`` adds vectors to outputs of projections.

        Args:
            biases: Vector ``[d_head]`` by layer and head of the projection, by the projection's name (``q_proj``).
        """
        with ExitStack() as stack:
            for name, vectors in biases.items():
                for (where, head), vector in vectors.items():

                    def add(_: Any, __: Any, output: Tensor, head: int = head, vector: Tensor = vector) -> Tensor:
                        output = output.clone()
                        output[..., head * len(vector) : (head + 1) * len(vector)] += vector
                        return output

                    projection = getattr(self.eager.model.layers[where].self_attn, name)
                    stack.callback(projection.register_forward_hook(add).remove)
            yield

    def generate(self, tokens: Tensor, n: int, edits: Edits | None = None, stop: Sequence[int] = (1,)) -> list[int]:
        """Greedy tokens from Hugging Face's ``generate`` with its cache, without the stop token."""
        asked = (*tokens.tolist(), n, *stop)
        if edits is None and asked in self._generated:
            return self._generated[asked]
        model = self.eager if edits is None else self.hf
        with torch.no_grad(), self.edited(edits or Edits()):
            out = model.generate(
                tokens[None], attention_mask=torch.ones_like(tokens)[None], max_new_tokens=n, do_sample=False,
                eos_token_id=list(stop), pad_token_id=2,
            )  # fmt: skip
        made = out[0, len(tokens) :].tolist()
        made = made[:-1] if made[-1] in stop else made
        if edits is None:
            self._generated[asked] = made
        return made


def add_to_rows(vectors: dict[tuple[int, int], Tensor], alpha: float, from_row: int = 0) -> Rows:
    """An edit that adds ``alpha * vectors[layer, head]`` to each head, in rows from position ``from_row`` on."""

    def add(layer: int, tensor: Tensor, first: int) -> Tensor:
        result = tensor.clone()
        for (where, head), vector in vectors.items():
            if where == layer:
                result[:, head, max(0, from_row - first) :] += (alpha * vector).to(tensor.dtype)
        return result

    return add


def split_softmax_rows(
    heads: Sequence[tuple[int, int]], tau: float, span: Sequence[int], from_row: int, *, sinks: bool = False
) -> Rows:
    """Split-softmax (equations 2 and 3 of the paper) in float64, one row and one key at a time.

    With ``sinks``, the mass that a row lacks to one is a further weight outside the span.
    """

    def turn(layer: int, pattern: Tensor, first: int) -> Tensor:
        result = pattern.clone()
        for head in (head for where, head in heads if where == layer):
            for row in range(max(0, from_row - first), pattern.shape[2]):
                weights: list[float] = pattern[0, head, row].tolist()
                inside = set(span)
                p = sum(weights[j] for j in inside)
                rest = sum(weight for j, weight in enumerate(weights) if j not in inside)
                rest += 1 - p - rest if sinks else 0
                if p == 0 or rest == 0:
                    continue
                p /= p + rest
                up, down = p**tau / p, (1 - p**tau) / (1 - p)
                edited = [weight * (up if j in inside else down) for j, weight in enumerate(weights)]
                result[0, head, row] = torch.tensor(edited, dtype=torch.float64).to(pattern.dtype)
        return result

    return turn

"""Training loss of directions by their effect on answers: the model's log-likelihood of a response under steering.

The score objective trains each head alone, on activations of the unmodified model. Here, all heads are steered in one
pass, and the gradient goes through the whole model.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.directions.activations import LayerHeads
from focuslens.directions.training_state import TrainedVectors
from focuslens.hooks import Cursor, Hook, hook_name
from focuslens.interventions.directions import Site
from focuslens.interventions.low_rank import LowRank
from focuslens.interventions.steering import adding
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.sample import Case, MultiDocSample

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["AnsweredPrompts", "answer_loss"]


class AnsweredPrompts:
    """Prompts of the training samples and the responses to their gold prompts.

    Args:
        model: Model whose tokenizer encodes the prompts.
        samples: Training samples.
        responses: Response tokens of each sample.
        case: Case of the prompts.
    """

    def __init__(
        self, model: FocusModel, samples: Sequence[MultiDocSample], responses: Sequence[Tensor], case: Case
    ) -> None:
        self._model, self._samples, self._responses = model, samples, responses
        self._case: Case = case

    def __len__(self) -> int:
        return len(self._samples)

    def follow(self, order: Sequence[int]) -> Generator[tuple[EncodedPrompt, Tensor]]:
        """Yield the prompts and responses of the samples with the indices ``order``, in this order."""
        for index in order:
            yield self._model.encode(self._samples[index].prompt(self._case)), self._responses[index]


def answer_loss(
    model: FocusModel,
    vectors: TrainedVectors,
    groups: Sequence[LayerHeads],
    prompt: EncodedPrompt,
    response: Int[Tensor, "response"],
    site: Site,
) -> Float[Tensor, "1"]:
    """Mean negative log-likelihood of a response's tokens, if all heads are steered in all rows at ``alpha = 1``.

    One prompt is run at a time. Activations below the first steered layer are not stored.

    Args:
        model: The model.
        vectors: Vectors of the heads, with respect to which the loss can be differentiated.
        groups: Heads, grouped by layer.
        prompt: The prompt.
        response: Tokens of the response, each of which is predicted from the prompt and all earlier tokens.
        site: Site of the vectors.
    """
    tokens = torch.cat((prompt.tokens, response))
    model.require_room(len(tokens))
    hooks = _hooks(model, vectors, groups, site)
    with _frozen(model.hooked), model.intervened((), prompt, Cursor(0), hooks):
        logits = model.run(tokens[None], torch.ones(1, len(tokens), dtype=torch.long), None, last_only=False)
    predicted = logits[0, len(prompt.tokens) - 1 : -1]
    exact = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    return F.cross_entropy(exact, response.to(exact.device))[None]


def _hooks(model: FocusModel, vectors: TrainedVectors, groups: Sequence[LayerHeads], site: Site) -> list[Hook]:
    """Hooks that steer all heads, through which gradients reach the vectors."""
    shape, infix, first_key = model.shape, "rot_" if site == "rotary" else "", 0
    hooks: list[Hook] = []

    def add(name: str, added: Tensor, product: LowRank | None = None) -> None:
        hooks.append((name, adding(name, model, added[None], None, "all", None, product)))

    for group in groups:
        places, product = list(group.places), vectors.product
        placed = [
            _placed(shape.n_heads, group.heads, tensor[places])
            for tensor in (vectors.query, *(() if product is None else (product.u, product.v)))
        ]
        lowest = None if product is None else LowRank(placed[1][None], placed[2][None])
        add(hook_name(group.layer, f"hook_{infix}q"), placed[0], lowest)
        if vectors.key is not None:
            own = vectors.key[first_key : first_key + len(group.key_value_heads)]
            add(hook_name(group.layer, "hook_k"), _placed(shape.n_key_value_heads, group.key_value_heads, own))
            first_key += len(group.key_value_heads)
    return hooks


def _placed(n_heads: int, heads: Sequence[int], values: Float[Tensor, "n ..."]) -> Float[Tensor, "head ..."]:
    """Values of all heads of a layer, which are zero except for ``heads``, as a differentiable function of them."""
    index = torch.tensor(heads, device=values.device)
    return values.new_zeros(n_heads, *values.shape[1:]).index_copy(0, index, values)


@contextmanager
def _frozen(hooked: Any) -> Generator[None]:
    """Context in which no activation is stored for gradients of the model's weights."""
    trainable = [parameter for parameter in hooked.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)

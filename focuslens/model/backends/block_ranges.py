"""Runs of some of the blocks of a bridge, inside a pass of Hugging Face's own model.

A model gives its blocks more than the residual stream: rotary tables, of one or several kinds, or masks. Hugging Face's
model therefore runs as usual, and blocks outside the range return what they receive.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.model.engine import Filled

__all__ = ["block_input", "run_blocks"]


def block_input(hooked: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """Input of the first block of a bridge."""
    inputs: list[Tensor] = []

    def first(*arguments: Any, **named: Any) -> Any:
        inputs.append(_residual(arguments, named))
        raise Filled

    with _replaced(hooked.blocks, [first]), suppress(Filled):
        hooked.original_model.base_model(input_ids=tokens, use_cache=False)
    return inputs[0]


def run_blocks(
    hooked: Any,
    layers: range,
    residual: Float[Tensor, "batch pos d_model"],
    positions: Int[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """Output of consecutive blocks of a bridge; ``residual`` itself if an attention layer ended the pass before.

    Args:
        hooked: The bridge.
        layers: The blocks.
        residual: Input of the first of them.
        positions: Positions of the tokens.
    """
    outputs: list[Tensor] = []

    def skip(*arguments: Any, **named: Any) -> Any:
        return _residual(arguments, named)

    def run(forward: Callable[..., Any], is_first: bool, is_last: bool, *arguments: Any, **named: Any) -> Any:
        if is_first:
            arguments, named = _with_residual(residual, arguments, named)
        result = forward(*arguments, **named)
        if is_last:
            outputs.append(result[0] if isinstance(result, tuple) else result)
            raise Filled
        return result

    blocks = hooked.blocks
    forwards: list[Callable[..., Any]] = [skip] * layers.start
    forwards += [
        partial(run, blocks[layer].forward, layer == layers.start, layer == layers.stop - 1) for layer in layers
    ]
    # The first argument only tells the sizes.
    with _replaced(blocks, forwards), suppress(Filled):
        hooked.original_model.base_model(
            inputs_embeds=residual, position_ids=positions.to(residual.device), use_cache=False
        )
    return outputs[0] if outputs else residual


def _residual(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    residual = arguments[0] if arguments else named["hidden_states"]
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"a block received a {type(residual).__name__} as its first argument, not a tensor")
    return residual


def _with_residual(
    residual: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((residual, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": residual})


@contextmanager
def _replaced(blocks: Any, forwards: Sequence[Callable[..., Any]]) -> Generator[None]:
    """Replace the ``forward`` of the first blocks, and put back what another library had put there."""
    changed = list(zip(blocks, forwards, strict=False))
    earlier = [vars(block).get("forward") for block, _ in changed]
    try:
        for block, forward in changed:
            vars(block)["forward"] = forward  # ``setattr`` on a bridge would change the wrapped module
        yield
    finally:
        for (block, _), forward in zip(changed, earlier, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                vars(block)["forward"] = forward

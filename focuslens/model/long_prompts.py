"""Progress of single passes over long prompts, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from torch import Tensor

from focuslens.model.backends import Backend
from focuslens.util.progress import late_bar

__all__ = ["layers_counted", "layers_shown"]


def layers_shown(tokens: Tensor, n_layers: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress bar of a pass, which appears only if the pass takes several seconds.

    On a GPU, the bar counts the layers whose work has been handed over, not those that are finished.

    Args:
        tokens: Tokens of the pass, or its residual stream: ``[batch row ...]``.
        n_layers: Number of layers that the pass runs.

    Returns:
        Context manager with a function to call with the number of finished layers.
    """
    n_prompts, n_rows = tokens.shape[:2]
    several = f"{n_prompts} prompts" if n_prompts > 1 else "prompt"
    return late_bar(f"{several} of {n_rows:,} tokens", n_layers, unit="layer")


@contextmanager
def layers_counted(backend: Backend, reach: Callable[[int], None]) -> Generator[None]:
    """Call ``reach`` with the index of each layer that begins, in the passes of TransformerLens inside the block."""

    def counting(layer: int) -> Any:
        def count(point: Any, arguments: Any) -> None:
            reach(layer)

        return count

    handles: list[Any] = []
    try:
        for layer in range(backend.shape.n_layers):
            with suppress(AttributeError):  # a block of an unusual architecture has another point, and is not counted
                handles.append(backend.residual_point(layer).register_forward_pre_hook(counting(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()

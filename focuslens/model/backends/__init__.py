"""Common interface to the two kinds of TransformerLens model that a FocusModel can run.

``HookedTransformer`` (TransformerLens 3.x) and ``TransformerBridge`` (3.x and 4.x) have the same hook names. The two
kinds need different code to replace their attention with the attention engine, and to compute only the logits of the
last row.
"""

from __future__ import annotations

from typing import Any

from focuslens.model.backends.base import Backend, describe
from focuslens.model.backends.bridge import BridgeBackend
from focuslens.model.backends.hooked import HookedBackend

__all__ = ["Backend", "BridgeBackend", "HookedBackend", "backend_for", "describe"]


def backend_for(hooked: Any, config: Any = None) -> Backend:
    """Backend for a TransformerLens model.

    Args:
        hooked: The TransformerLens model.
        config: Hugging Face configuration of a ``HookedTransformer``, if it is known. A bridge has its own.

    Raises:
        TypeError: If the model is neither a ``HookedTransformer`` nor a ``TransformerBridge``.
    """
    names = {cls.__name__ for cls in type(hooked).__mro__}
    if "TransformerBridge" in names:
        return BridgeBackend(hooked)
    if "HookedTransformer" in names:
        return HookedBackend(hooked, config)
    raise TypeError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(hooked).__name__}; "
        "for a checkpoint use FocusModel.from_pretrained, for a loaded Hugging Face model FocusModel.from_loaded"
    )

"""Which kinds of model the installed TransformerLens has. Importing this module does not import torch."""

from __future__ import annotations

from importlib.metadata import version

import pytest

__all__ = ["HAS_HOOKED", "needs_hooked"]

HAS_HOOKED = int(version("transformer-lens").split(".")[0]) < 4

needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")

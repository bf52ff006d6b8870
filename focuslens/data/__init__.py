"""Where samples come from."""

from focuslens.data.multidoc import MultiDocData, load_multidoc

__all__ = ["MultiDocData", "load_multidoc"]

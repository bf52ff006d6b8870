"""Sources of samples: multi-document files, needles in a haystack, and the synthetic corpus."""

from focuslens.data.multidoc import MultiDocData, load_multidoc

__all__ = ["MultiDocData", "load_multidoc"]

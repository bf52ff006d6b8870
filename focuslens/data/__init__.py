"""Sources of samples: lost-in-the-middle files, needle-in-a-haystack prompts and the synthetic corpus."""

from focuslens.data.multidoc import MultiDocData, load_multidoc

__all__ = ["MultiDocData", "load_multidoc"]

"""Sources of samples: lost-in-the-middle files, own tables, needle-in-a-haystack prompts and the synthetic corpus."""

from focuslens.data.multidoc import MultiDocData, load_multidoc
from focuslens.data.own_samples import OwnData, load_samples

__all__ = ["MultiDocData", "OwnData", "load_multidoc", "load_samples"]

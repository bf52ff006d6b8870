"""The two published studies that the package reproduces: the paper's artefacts, and HELMET."""

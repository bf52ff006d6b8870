"""Every table and figure of "Focus Directions" (arXiv 2503.23306), one module an artefact, one YAML file a model."""

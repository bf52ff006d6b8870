"""Tables and figures of "Focus Directions" (arXiv 2503.23306): one module per artefact, one YAML file per model."""

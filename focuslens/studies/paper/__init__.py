"""Tables and figures of "Focus Directions" (arXiv 2503.23306), with a module per artefact and a YAML file per model."""

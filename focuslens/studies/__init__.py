"""The two reproduced studies: the artefacts of "Focus Directions", and its HELMET tables."""

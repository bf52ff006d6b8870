"""A TransformerLens model under interventions: checkpoints, passes, caches, decoding, and the attention engine."""

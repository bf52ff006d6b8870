"""TransformerLens models under interventions: checkpoints, forward passes, caches, decoding, the attention engine."""

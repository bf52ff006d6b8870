"""TransformerLens models under interventions: loading, forward passes, caches, decoding and the attention engine."""

"""Focus directions: training, activations, anatomy, the authors' published files, and steered checkpoints."""

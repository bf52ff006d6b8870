"""Focus directions: training, analysis, the files that the paper's authors published, and steered checkpoints."""

"""Training a language model end to end: data, step, loop, checkpoints, evaluation (see train/main.py)."""

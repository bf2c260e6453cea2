"""Weights in and out: the authors' checkpoints, Mamba-2 as released, and a layout of our own (docs/weights.md)."""

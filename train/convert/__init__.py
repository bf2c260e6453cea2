"""Weights in and out: the authors' checkpoints, and a layout of this library's own (docs/weights.md)."""

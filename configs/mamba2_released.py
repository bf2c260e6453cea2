"""Mamba-2 as its authors released it: blocks of a mixer alone, queries and keys that heads share, a tied head.

Table row: none; the paper's Mamba-2 figures are of one head of 64 beside a gated MLP, which this is not.
Size:      2 d_model / 64 heads of 64, K = 128, and as many layers as come nearest to the other variants' parameters
           outside of embeddings: nano 0.7 M, lab 21 M, small 211 M, medium 644 M, large 1.0 B.
Hardware:  nano two CPU cores; lab one GPU; small and medium an accelerator with room for 32 rows of 2048 tokens.
Command:   python -m train.main --config configs/mamba2_released.py
"""

from ml_collections import ConfigDict

from configs import base

LAYERS = {"nano": 5, "lab": 12, "small": 32, "medium": 44, "large": 39}


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES, with layers and heads of its own."""
    config = base.get_config(name="mamba2_released", variant="mamba2-released", size=size)
    config.model.num_layers = LAYERS[size]
    config.model.num_heads = 2 * config.model.d_model // config.model.head_dim
    config.model.mlp_dim = 0
    config.model.tie_embeddings = True
    return config

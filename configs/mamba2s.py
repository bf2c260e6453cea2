"""Mamba-2S (Algorithm 4): Mamba-2 cut down to what matters.

Table row: Table 3, 'Conv (w=2) + A-mask softplus + value discretize', small at T = 2048 (test loss: 2.76).
Medium: no figure.
Size:      nano 0.8 M parameters; small 275 M, medium 735 M (d_model 1536, 27 layers), with the paper's vocabulary.
Hardware:  nano two CPU cores, 1 min 55 s; small and medium an accelerator with room for 32 rows of 2048 tokens.
Expected:  nano 2.02 bits per byte, held out; small and medium the losses above, on the paper's FineWeb only.
Command:   python -m train.main --config configs/mamba2s.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES."""
    return base.get_config(name="mamba2s", variant="mamba2s", size=size)

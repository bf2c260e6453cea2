"""Mamba-2 whole (Algorithms 2 and 3).

Table row: none; the published Mamba-2 figures (small 2.88, medium 2.75) are of another implementation's layer.
Size:      nano 0.8 M parameters; small 275 M, medium 735 M (d_model 1536, 27 layers), with the paper's vocabulary.
Hardware:  nano two CPU cores, 2 min 32 s; small and medium an accelerator with room for 32 rows of 2048 tokens.
Expected:  nano 1.87 bits per byte, held out; small and medium the losses above, on the paper's FineWeb only.
Command:   python -m train.main --config configs/mamba2.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES."""
    return base.get_config(name="mamba2", variant="mamba2", size=size)

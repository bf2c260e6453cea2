"""2Mamba-E: 2Mamba with the exponential score, which needs a key/value cache.

Table row: Figure 10, '2Mamba-E', medium at T = 2048 (the paper's test loss: 2.59). Small: no figure.
Size:      nano 0.8 M parameters; small 275 M, medium 735 M (d_model 1536, 27 layers), with the paper's vocabulary.
Hardware:  nano two CPU cores, 1 min 49 s; small and medium an accelerator with room for 32 rows of 2048 tokens.
Expected:  nano 2.00 bits per byte, held out; small and medium the losses above, on the paper's FineWeb only.
Command:   python -m train.main --config configs/2mamba_e.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES."""
    return base.get_config(name="2mamba_e", variant="2mamba-e", size=size)

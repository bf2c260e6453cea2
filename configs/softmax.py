"""Softmax attention with rotary embeddings, the baseline.

Table row: Figures 1 and 5a, 'Softmax', small at T = 2048 (test loss: 2.73); medium 2.61.
Size:      nano 0.8 M parameters; small 275 M, medium 735 M (d_model 1536, 27 layers), with the paper's vocabulary.
Hardware:  nano two CPU cores, 1 min 32 s; small and medium an accelerator with room for 32 rows of 2048 tokens.
Expected:  nano 2.28 bits per byte, held out; small and medium the losses above, on the paper's FineWeb only.
Command:   python -m train.main --config configs/softmax.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES."""
    return base.get_config(name="softmax", variant="softmax", size=size)

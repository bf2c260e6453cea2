"""Linear attention: ReLU on queries and keys, softmax norm.

Table row: Table 2, 'SM Norm + ReLU', small at T = 2048 (the paper's test loss: 3.03). Medium: no figure.
Size:      nano 0.8 M parameters; small 275 M, medium 735 M (d_model 1536, 27 layers), with the paper's vocabulary.
Hardware:  nano two CPU cores, 1 min 32 s; small and medium an accelerator with room for 32 rows of 2048 tokens.
Expected:  nano 3.35 bits per byte, held out; small and medium the losses above, on the paper's FineWeb only.
Command:   python -m train.main --config configs/linear.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES."""
    return base.get_config(name="linear", variant="linear", size=size)

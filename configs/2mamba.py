"""2Mamba (Algorithm 5): squared score, softmax norm, convolution of width 2, softplus decay.

Table row: Figure 6 and the appendix's tables of contexts, '2Mamba', medium at T = 2048 (the paper's test loss: 2.62).
Small: the paper reports the model with value discretisation (2.73), variant 2mamba-dt, not this one.
Size:      nano 0.8 M parameters; small 275 M, medium 735 M (d_model 1536, 27 layers), with the paper's vocabulary.
Hardware:  nano two CPU cores, 1 min 50 s; small and medium an accelerator with room for 32 rows of 2048 tokens.
Expected:  nano 2.04 bits per byte, held out; small and medium the losses above, on the paper's FineWeb only.
Command:   python -m train.main --config configs/2mamba.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES."""
    return base.get_config(name="2mamba", variant="2mamba", size=size)

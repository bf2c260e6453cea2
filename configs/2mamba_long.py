"""2Mamba with long half-lives at first and value discretisation: the variant 2mamba-dt-long.

AdamW forgets the squares of gradients in 20 steps and not in 1,000 (b2 0.95 for the paper's 0.999): the squared score's
gradients spike, and losses were lower for it at nano and lab, on both texts that were tried. Small and medium were not.

Table row: none of the paper's; docs/accuracy.md has where it stands beside softmax and the paper's models.
Size:      nano 0.8 M parameters, lab 21.6 M; small 276 M, medium 738 M, with the paper's vocabulary.
Hardware:  nano two CPU cores; lab one GPU, a minute; small and medium an accelerator with room for 32 rows of 2048.
Command:   python -m train.main --config configs/2mamba_long.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration in one of base.SIZES."""
    config = base.get_config(name="2mamba_long", variant="2mamba-dt-long", size=size)
    config.optimizer.b2 = 0.95
    return config

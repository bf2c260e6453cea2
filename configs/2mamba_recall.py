"""The recall task: a string of 32 random symbols that comes again after a gap, accuracy on the repeat.

Table row: none, the task is not the paper's. It shows the mixing at work, which the default corpus hardly does.
Size:      0.36 M parameters, 2 layers of 2 heads of 64.
Hardware:  two CPU cores, 1 min 30 s.
Expected:  held-out accuracy 2mamba 100.0 %, mamba2s 99.9 %, softmax 99.7 %, linear 41 %, and memoryless (2mamba with
           its mixing cut) 1.5 %, which is chance.
Command:   python -m train.main --config configs/2mamba_recall.py
           python -m train.main --config configs/2mamba_recall.py --config.variant=softmax
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "nano") -> ConfigDict:
    """The configuration; `nano` is its only size. Raises ValueError for another."""
    if size != "nano":
        raise ValueError(f"unknown size {size!r}: the recall task has nano only")
    config = base.get_config(name="2mamba_recall", variant="2mamba", size=size)
    config.data = ConfigDict()
    config.data.source = "recall"
    config.data.symbols = 64
    config.data.repeat = 32
    config.data.fillers = 16
    config.data.gap = (4, 12)
    config.data.graded = True
    config.data.train_rows = 1_000_000
    config.data.held_out_rows = 512
    config.model.num_layers = 2
    config.model.vocab_size = 128
    config.steps = 1200
    config.length = 80
    config.batch_size = 32
    config.sample = ConfigDict({"temperature": 0.0})
    return config

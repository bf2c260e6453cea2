"""What stands between products, bound by memory: the backward passes of norms, convolutions, MLPs; rows of logits."""

"""The floating-point operations that training must do for a token, and the device's peak, for the MFU.

MFU is (operations a token) x (tokens a second) / (peak of all devices). The operations are the model's own, a product
of matrices [m, k] [k, n] counted as 2 m k n: what recomputation (remat), masked halves or padding add is not counted.
"""

from typing import Any

import jax

from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.ops.score import SCORES, num_features

# Dense bfloat16 products, operations a second of one device, by `device_kind` as JAX names it. MFU is against this
# peak whatever `execution.dtype` is.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,  # NVIDIA A100 Tensor Core GPU data sheet, 2021
    "NVIDIA A100-SXM4-80GB": 312e12,  # the same
    "NVIDIA A100 80GB PCIe": 312e12,  # the same
    "NVIDIA L4": 121e12,  # NVIDIA L4 data sheet: 242 with sparsity
    "NVIDIA L40S": 362e12,  # NVIDIA L40S data sheet
    "NVIDIA H100 PCIe": 756e12,  # NVIDIA H100 Tensor Core GPU data sheet: 1,513 with sparsity
    "NVIDIA H100 80GB HBM3": 989e12,  # the same, SXM5: 1,979 with sparsity
    "NVIDIA H200": 989e12,  # NVIDIA H200 Tensor Core GPU data sheet: 1,979 with sparsity
    "NVIDIA B200": 2250e12,  # NVIDIA DGX B200 data sheet: 36 PFLOP/s for eight with sparsity
    "TPU v4": 275e12,  # Google Cloud documentation, "TPU v4"
    "TPU v5 lite": 197e12,  # Google Cloud documentation, "TPU v5e"
    "TPU v5": 459e12,  # Google Cloud documentation, "TPU v5p"
    "TPU v6 lite": 918e12,  # Google Cloud documentation, "TPU v6e"
}


def mixing_flops(mixer: MixerConfig, head_dim: int, length: int, num_heads: int = 1) -> float:
    """Forward operations of one of `num_heads` query heads for one token, V = `head_dim`, T = `length`.

    Quadratic: on average T / 2 keys, 2 K for each score and 2 V for each weighted value: T (K + V). By the state:
    2 D V to add a token to it and 2 D V to read it, D = K (`linear`) or K (K + 1) / 2 (`squared`): 4 D V. `exp` has
    the quadratic form alone; the others count the cheaper of the two, whichever form runs. Where heads share queries
    and keys, a score counts once for all of them.
    """
    qk_dim = mixer.qk_dim or head_dim
    scores = qk_dim if mixer.qk_groups is None else qk_dim * mixer.qk_groups / num_heads
    quadratic = length * (scores + head_dim)
    if SCORES[mixer.score].finite is None:
        return quadratic
    return min(quadratic, 4 * num_features(mixer.score, qk_dim) * head_dim)


def training_flops_per_token(config: ModelConfig, params: Any, length: int) -> float:
    """6 N + 3 (mixing of all layers and heads), a token of a row of `length`.

    N: parameters but for the embedding, a table that is looked up, unless it is the head too; each multiplies once
    forward (2) and twice backward (4). The mixing costs twice its forward operations in the backward pass. `params` may
    be abstract.
    """
    looked_up = () if config.tie_embeddings else ("embedding",)
    counted = sum(leaf.size for name, tree in params.items() if name not in looked_up for leaf in jax.tree.leaves(tree))
    heads = config.num_heads
    mixing = sum(heads * mixing_flops(mixer, config.head_dim, length, heads) for mixer in config.layer_mixers)
    return 6 * counted + 3 * mixing


def peak_flops(devices: list[Any]) -> float | None:
    """The peak of all `devices` together; None where it is not known of one of them."""
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    return None if None in peaks else sum(peaks)

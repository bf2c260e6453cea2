"""Every entry of the table as kernels to compile, which takes no GPU."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quadratic.attention import Attention
from pallas_kernels.triton.device import served
from pallas_kernels.triton.quadratic.backward_keys import keys_kernel
from pallas_kernels.triton.quadratic.backward_queries import queries_kernel
from pallas_kernels.triton.quadratic.forward import forward_kernel
from pallas_kernels.triton.quadratic.kernels import KERNELS
from pallas_kernels.triton.quadratic.table import TABLE
from pallas_kernels.triton.quadratic.tiles import Tiles

BY_NAME = {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}
# Decay, segments, normalisation: any two of them in each of four ways.
FLAGS = (True, True, True), (True, False, False), (False, True, False), (False, False, True)


def programs() -> Iterator[dict[str, Any]]:
    """Every entry, with all of decay, segments and normalisation, with none, and with some.

    The keys: name, kernel, args (types of the pointers that are present), constexprs (the absent ones among them, as
    None), num_warps, num_stages, arch (the compute capabilities that take the entry).
    """
    for (name, capability, score, head_dim), entry in TABLE.items():
        for flags in FLAGS:
            yield program(name, score, head_dim, Tiles(**entry), *flags) | {"arch": served(capability)}


def program(name: str, score: str, head_dim: int, tiles: Tiles, decay: bool, segments: bool, normalize: bool):
    """One of `programs`, for any tiles; without `arch`."""
    tokens, heads, kv_heads = 8200, 8, 4  # the last tiles are not full
    shapes = [jax.ShapeDtypeStruct((2, tokens, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads)]
    problem = Attention(KERNELS, score, normalize, scale=head_dim**-0.5, floor=2.0**-100).problem(*shapes)
    present = {
        "prefix_ptr": decay,
        "suffix_ptr": decay,
        "total_ptr": decay,
        "first_ptr": segments,
        "last_ptr": segments,
        "norm_ptr": normalize,
        "delta_ptr": normalize,
        "logit_ptr": normalize or decay,
        "sums_ptr": decay,
    }
    kernel = BY_NAME[name]
    constants = tiles.constants(problem) | {
        "GROUP": 2,
        "FLOOR": problem.floor,
        "LATE": problem.late_scale(decay),
        "GRADIENT_SCALE": problem.gradient_scale / problem.query_power,
    }
    pointers = [x for x in kernel.arg_names if x.endswith("_ptr")]
    types = {"first_ptr": "*i32", "last_ptr": "*i32"}
    kinds = [kind for kind, has in (("decay", decay), ("segments", segments), ("normalize", normalize)) if has]
    return {
        "name": "-".join([name, score, str(head_dim), *kinds]),
        "kernel": kernel,
        "args": {x: types.get(x, "*fp32" if x in present else "*bf16") for x in pointers if present.get(x, True)},
        "constexprs": {x: value for x, value in constants.items() if x in kernel.arg_names}
        | {x: None for x in pointers if not present.get(x, True)},
        "num_warps": tiles.warps,
        "num_stages": tiles.num_stages,
    }

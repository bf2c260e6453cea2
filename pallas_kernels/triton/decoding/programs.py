"""The kernels of decoding as programs that can be compiled for every architecture without a GPU."""

import itertools
from collections.abc import Iterator

import jax

from pallas_kernels.decoding.contract import SIZE, DecodeStep
from pallas_kernels.triton.decoding import fold, step
from pallas_kernels.triton.device import served

LAYERS, BATCH, GROUPS = 20, 64, 16  # squared states of more than 2^31 numbers
FEATURES = {"linear": SIZE, "squared": SIZE * (SIZE + 1) // 2}
FOLD_SIZES = (16, 64)
DTYPES = {"float32": "*fp32", "bfloat16": "*bf16"}


def programs() -> Iterator[dict]:
    """A step and a fold of every score, dtype of the states, two fold sizes and table entry, as dicts.

    name, kernel, args (types of the pointers by parameter), constexprs, num_warps, num_stages, arch: the architectures
    that the entry serves; mma: whether the kernel is to have tensor core instructions.
    """
    cases = itertools.product(sorted(step.TILES), FEATURES, DTYPES, FOLD_SIZES)
    for entry, score, dtype, size in cases:
        name, arch = f"{score}-{dtype}-{size}", {"arch": served(entry)}
        for normalize, heads in ((True, 1), (True, 4), (False, 1)):
            kinds = f"-heads-{heads}" + normalize * "-normalize"
            yield _step(f"decode_step-{name}{kinds}", entry, score, dtype, size, normalize, heads) | arch
        for rollback in (True, False):
            yield _fold(f"fold-{name}" + rollback * "-rollback", entry, score, dtype, size, rollback) | arch


def _step(name, entry, score, dtype, size, normalize, heads) -> dict:
    cut, spec = step.TILES[entry], DecodeStep(score, normalize, SIZE**-0.5)
    kv = jax.ShapeDtypeStruct((LAYERS, BATCH, GROUPS, FEATURES[score], SIZE), dtype)
    integers = dict.fromkeys(("layer_ptr", "folded_ptr", "length_ptr"), "*i32")
    tokens = dict.fromkeys(("keys_ptr", "values_ptr", "q_ptr", "k_ptr", "v_ptr"), "*bf16")
    sums = dict.fromkeys(("z_ptr", "decay_ptr", "y_ptr"), "*fp32")
    return {
        "name": name,
        "kernel": step.decode_step_kernel,
        "args": integers | tokens | sums | {"kv_ptr": DTYPES[dtype]},
        "constexprs": step.constexprs(spec, cut, BATCH, GROUPS, heads, kv, 2 * size),
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
        "mma": False,
    }


def _fold(name, entry, score, dtype, size, rollback) -> dict:
    cut, shape = fold.TILES[entry], (LAYERS, BATCH, GROUPS, FEATURES[score], SIZE)
    args = {"plan_ptr": "*i32"}
    args |= dict.fromkeys(("keys_ptr", "values_ptr"), "*bf16")
    args |= dict.fromkeys(("weights_ptr", "carry_ptr", "sum_ptr"), "*fp32")
    args |= {"kv_ptr": DTYPES[dtype]}
    before = {"before_ptr": DTYPES[dtype], "before_sum_ptr": "*fp32"}
    absent = {} if rollback else dict.fromkeys(before)
    return {
        "name": name,
        "kernel": fold.fold_kernel,
        "args": args | (before if rollback else {}),
        "constexprs": fold.constexprs(score, cut, shape, 2 * size, size) | absent,
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
        "mma": True,
    }

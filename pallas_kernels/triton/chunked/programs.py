"""The chunked kernels as programs that can be compiled without a GPU."""

import itertools
from collections.abc import Iterator

from pallas_kernels.chunked.layout import BLOCK, HEAD_DIM, STARTS, TILES
from pallas_kernels.triton.chunked.gradient import gradient_kernel
from pallas_kernels.triton.chunked.linear_gradient import linear_gradient_kernel
from pallas_kernels.triton.chunked.linear_query import linear_query_kernel
from pallas_kernels.triton.chunked.linear_update import linear_update_kernel
from pallas_kernels.triton.chunked.normalizer import normalizer_kernel
from pallas_kernels.triton.chunked.query import query_kernel
from pallas_kernels.triton.chunked.scan import scan_kernel
from pallas_kernels.triton.chunked.tiles import TABLE
from pallas_kernels.triton.chunked.update import update_kernel
from pallas_kernels.triton.device import served

SIZES = {"TOKENS": 65536, "HEADS": 16, "GROUPS": 8, "CHUNK": 1024}
BF16, F32 = "*bf16", "*fp32"


def _flags(*names: str) -> Iterator[dict[str, bool]]:
    """Every choice of what a call has."""
    for values in itertools.product((True, False), repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def _squared_update(tiles, dim):
    arguments = {"xt_ptr": BF16, "row_ptr": "*i32", "w_ptr": BF16, "s_ptr": F32}
    yield "", update_kernel, arguments, SIZES | {"BLOCK": tiles.block, "HELD": tiles.held, "DIM": dim, "STARTS": STARTS}


def _squared_query(tiles, dim):
    constexprs = {"ROWS": tiles.block, "DIM": dim, "TILES": TILES, "SQUARED_POWER": 0.25, "FLOOR": 2.0**-100}
    constexprs["AWAIT"] = tiles.awaits
    for has in _flags("weight", "normalizer"):
        arguments = {f"{name}_ptr": BF16 for name in ("x", "xt", "s", "added", "y")}
        arguments["weight_ptr"] = F32 if has["weight"] else None
        arguments["normalizer_ptr"] = BF16 if has["normalizer"] else None
        arguments |= dict.fromkeys(("own_norm_ptr", "norm_ptr"), F32 if has["normalizer"] else None)
        yield _name(has), query_kernel, arguments, SIZES | constexprs


def _squared_gradient(tiles, dim):
    for has in _flags("normalizer", "sums"):
        arguments = {f"{name}_ptr": BF16 for name in ("x", "xt", "w", "s", "added", "y")}
        arguments["normalizer_ptr"] = BF16 if has["normalizer"] else None
        arguments["factor_ptr"] = F32 if has["normalizer"] else None
        arguments["sums_ptr"] = F32 if has["sums"] else None
        yield _name(has), gradient_kernel, arguments, SIZES | {"ROWS": tiles.block, "DIM": dim, "TILES": TILES}


def _squared_normalizer(tiles, dim):
    for has in _flags("factor"):
        arguments = {"x_ptr": BF16, "factor_ptr": F32 if has["factor"] else None, "z_ptr": F32}
        yield _name(has), normalizer_kernel, arguments, SIZES | {"BLOCK": tiles.block, "DIM": dim}


def _linear_update(tiles, dim):
    for has in _flags("weight", "factor"):
        arguments = {"x_ptr": BF16, "w_ptr": BF16, "s_ptr": F32, "z_ptr": F32}
        arguments |= {f"{name}_ptr": F32 if has[name] else None for name in has}
        constexprs = {"BLOCK": tiles.block, "DIM": dim, "FEATURES": dim // tiles.parts}
        yield _name(has), linear_update_kernel, arguments, SIZES | constexprs


def _linear_query(tiles, dim):
    constexprs = {"ROWS": tiles.block, "DIM": dim, "POWER": 0.5, "FLOOR": 2.0**-100}
    for has in _flags("weight", "normalizer"):
        arguments = {f"{name}_ptr": BF16 for name in ("x", "s", "added", "y")}
        arguments["weight_ptr"] = F32 if has["weight"] else None
        normalizer = F32 if has["normalizer"] else None
        arguments |= dict.fromkeys(("normalizer_ptr", "own_norm_ptr", "norm_ptr"), normalizer)
        yield _name(has), linear_query_kernel, arguments, SIZES | constexprs


def _linear_gradient(tiles, dim):
    for has in _flags("weight", "normalizer", "factor", "sums"):
        if has["factor"] and not has["normalizer"]:
            continue
        arguments = {f"{name}_ptr": BF16 for name in ("w", "s", "added", "y")}
        arguments["x_ptr"] = BF16 if has["sums"] else None
        arguments |= {f"{name}_ptr": F32 if has[name] else None for name in has}
        yield _name(has), linear_gradient_kernel, arguments, SIZES | {"ROWS": tiles.block, "DIM": dim}


def _scan(tiles):
    alone = [has | {"parts": False, "other": False} for has in _flags("initial", "reverse")]
    more = [alone[-1] | {"parts": True}, alone[-1] | {"reverse": True, "other": True}]
    for has in [*alone, *more]:
        arguments = {"added_ptr": F32, "weight_ptr": F32, "initial_ptr": F32 if has["initial"] else None}
        arguments |= dict.fromkeys(("counts_ptr", "inner_ptr"), F32 if has["other"] else None)
        arguments |= {"other_ptr": BF16 if has["other"] else None, "before_ptr": BF16, "final_ptr": F32}
        constexprs = {"SIZE": TILES * HEAD_DIM**2, "CHUNKS": 64, "REVERSE": has["reverse"]}
        constexprs |= {"PARTS": 1 + has["parts"], "COUNTED": BLOCK * HEAD_DIM}
        yield _name(has), scan_kernel, arguments, constexprs | {"BLOCK": tiles.block, "AHEAD": tiles.num_stages}


ENTRIES = {
    "squared_update": _squared_update,
    "squared_query": _squared_query,
    "squared_gradient": _squared_gradient,
    "squared_normalizer": _squared_normalizer,
    "linear_update": _linear_update,
    "linear_query": _linear_query,
    "linear_gradient": _linear_gradient,
    "scan": _scan,
}


def _name(has: dict[str, bool]) -> str:
    return " ".join(name for name, value in has.items() if value)


def programs() -> Iterator[dict]:
    """Every kernel with every entry of the table and all that a call may have or lack: what to compile.

    Attributes of each: name, kernel, args (types of the pointers), constexprs (absent pointers too, as None),
    num_warps, num_stages, arch (the capabilities that the entry serves), mma (whether tensor cores are used).
    """
    for (kernel, capability, *dim), tiles in TABLE.items():
        for flags, function, arguments, constexprs in ENTRIES[kernel](tiles, *dim):
            absent = {name: None for name, type in arguments.items() if type is None}
            yield {
                "name": " ".join([kernel, *map(str, dim), *flags.split()]),
                "kernel": function,
                "args": {name: type for name, type in arguments.items() if type is not None},
                "constexprs": constexprs | absent,
                "num_warps": tiles.num_warps,
                "num_stages": tiles.num_stages,
                "arch": served(capability),
                "mma": kernel != "scan",
            }

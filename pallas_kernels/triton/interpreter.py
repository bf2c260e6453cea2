"""Triton kernels on a machine without a GPU: with TRITON_INTERPRET=1 they run, program by program, in NumPy.

The variable must be set before triton is first imported, and then holds for the whole process. What is checked is the
data flow: masks, indices, the rounding of bfloat16, memory that nothing writes (NaN). Races, layouts, registers and
shared memory are not, nor are loads out of bounds.

Triton's interpreter takes PyTorch's tensors and has no bfloat16 arithmetic; here are both, for NumPy's arrays.
"""

import functools
import os
import threading

import jax
import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = {
    BFLOAT16: "bf16",
    np.dtype("float16"): "fp16",
    np.dtype("float32"): "fp32",
    np.dtype("int32"): "i32",
    np.dtype("int64"): "i64",
    np.dtype("bool"): "i1",
}

_one_at_a_time = threading.Lock()  # the interpreter's state is global, and devices call back side by side


def interpreting() -> bool:
    """Whether this process interprets Triton kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Operand:
    """What the interpreter asks of a tensor, for an array that it reads and writes in place."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape
        self.dtype = NAMES[array.dtype]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def new_empty(self, *_, device=None) -> "_Operand":
        return _Operand.__new__(_Operand)

    def set_(self, storage: "_Operand", *_) -> None:
        self.__init__(storage.array)

    def untyped_storage(self) -> "_Operand":
        return self

    def cpu(self) -> "_Operand":
        return self

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> tuple[int, ...]:
        return ()

    def storage_offset(self) -> int:
        return 0

    def copy_(self, other: "_Operand") -> None:
        """Nothing to copy: the interpreter's copy of an operand is the operand."""


def call(kernel, operands: tuple, out_type: tuple, grid: tuple[int, ...], aliases: tuple, constexprs: dict) -> tuple:
    """The outputs of a kernel, and the operands `aliases` after it. Operands are arrays, or None for absent ones."""
    _patch()
    present = [i for i, operand in enumerate(operands) if operand is not None]
    names = [name for name in kernel.arg_names if name not in constexprs]

    def run(*arrays):
        everything = list(operands)
        for i, array in zip(present, arrays):
            everything[i] = _Operand(np.array(array, order="C"))
        results = [np.full(x.shape, -1 if np.issubdtype(x.dtype, np.integer) else np.nan, x.dtype) for x in out_type]
        arguments = dict(zip(names, [*everything, *map(_Operand, results)], strict=True))
        with _one_at_a_time:
            kernel[grid](**arguments, **constexprs)
        return (*results, *(everything[i].array for i in aliases))

    arrays = [operands[i] for i in present]
    changed = tuple(jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in aliases)
    return jax.pure_callback(run, (*out_type, *changed), *arrays, vmap_method="sequential")


@functools.cache
def _patch() -> None:
    """bfloat16 in the interpreter: an operation in float32, and one rounding to nearest even."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    def is_bfloat16(dtype) -> bool:
        return dtype.scalar == tl.bfloat16

    def widen(x):
        if isinstance(x, TensorHandle) and is_bfloat16(x.dtype):
            return TensorHandle(x.data.view(BFLOAT16).astype(np.float32), tl.float32)
        return x

    def narrow(x):
        if x.data.dtype == np.float32:
            return TensorHandle(x.data.astype(BFLOAT16).view(np.uint16), tl.bfloat16)
        return x

    def in_float32(name: str) -> None:
        plain = getattr(Builder, name)

        def operation(self, x, *rest):
            if not is_bfloat16(x.dtype):
                return plain(self, x, *rest)
            return narrow(plain(self, widen(x), *map(widen, rest)))

        setattr(Builder, name, operation)

    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt"):
        in_float32(name)
    dot, cast, convert = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self, x, dtype):
        if is_bfloat16(dtype):
            if is_bfloat16(x.dtype):
                return x
            return narrow(TensorHandle(x.data.astype(np.float32), tl.float32))
        if is_bfloat16(x.dtype):
            wide = widen(x)
            return wide if dtype.scalar == tl.float32 else cast(self, wide, dtype)
        return cast(self, x, dtype)

    def get_bf16(self, value):
        return TensorHandle(np.array([value], BFLOAT16).view(np.uint16), tl.bfloat16)

    def create_fp_to_fp(self, x, dtype, rounding):
        if is_bfloat16(x.dtype) or is_bfloat16(dtype):
            return cast_impl(self, x, dtype)
        return convert(self, x, dtype, rounding)

    Builder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
    Builder.cast_impl = cast_impl
    Builder.get_bf16 = get_bf16  # constants
    Builder.create_fp_to_fp = create_fp_to_fp

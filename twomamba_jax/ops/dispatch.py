"""The form and the implementation of a call: what is named runs or raises, and what is not is chosen here.

`xla` are the forms of `ops.forms`, for every call. `mosaic_gpu` are kernels, which say of a call why they cannot
compute it, and are imported where there is a device for them.
"""

import ctypes.util
import functools
import importlib.metadata
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import jax

from pallas_kernels.device import unsupported_device
from twomamba_jax.ops import xla
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.score import SCORES, num_features
from twomamba_jax.ops.sequence import SequenceAxis

Form = Literal["parallel", "chunked", "recurrent"]
FORMS = get_args(Form)
Implementation = Literal["xla", "mosaic_gpu"]
IMPLEMENTATIONS = get_args(Implementation)
MOSAIC_GPU = "mosaic_gpu"

# The parallel exponential form holds T^2 weights per head; beyond this many tokens the blockwise form is chosen.
LONGEST_PARALLEL_SOFTMAX = 2048

# From this version on kernels spill where libnvJitLink is there (docs/measurements/jax_0_12.md).
SPILLING_JAX = (0, 12)

_log = logging.getLogger("twomamba_jax")


def load(implementation: Implementation) -> ModuleType:
    """The module of an implementation: its `attend`, and for kernels what else they compute and why they cannot."""
    if implementation == "xla":
        return xla
    from twomamba_jax.ops import mosaic_gpu  # slow to import, and not there on every platform

    return mosaic_gpu


def refusal(ask: Callable[[ModuleType], str | None]) -> str | None:
    """Why the kernels cannot do something here: for want of a device, or what `ask(kernels)` says; None if they can."""
    return unsupported_device() or ask(load(MOSAIC_GPU))


def choose(
    op: Operation,
    q,
    k,
    v,
    state,
    axis: SequenceAxis | None,
    form: Form | None,
    chunk_size: int | None,
    implementation: Implementation | None,
) -> tuple[Form, Implementation]:
    """The form and the implementation of a call of arrays [B, T, heads, dim].

    Where no form is named, a `chunk_size` asks for the chunked one.

    Raises:
      ValueError: an unknown form or implementation, one that cannot compute the call, or a `chunk_size` for a form that
        has no chunks.
    """
    check_form(op, form, chunk_size)

    def ask(form, kernels):
        return kernels.unsupported(op, q, k, v, state, axis, chunk_size, form)

    if form is None and chunk_size:
        form = "chunked"
    if form is None and implementation != "xla":
        form = _fastest_of_kernels(op, q, v, axis, ask)
    if form is None:
        form = _fewest_flops(op, _tokens_of_a_device(q, axis), q.shape[-1], v.shape[-1])
    return form, choose_implementation(implementation, form, functools.partial(ask, form))


def choose_implementation(
    implementation: Implementation | None, form: str, ask: Callable[[ModuleType], str | None]
) -> Implementation:
    """The implementation named, or for None the kernels where they can compute the call; that is logged once.

    `ask` is as in `refusal`. Raises ValueError for an unknown implementation, and for kernels that are named and
    cannot.
    """
    check_name(implementation)
    if implementation == "xla":
        return implementation
    reason = refusal(ask)
    if implementation == MOSAIC_GPU:
        if reason:
            raise ValueError(f"implementation='mosaic_gpu' cannot compute this call: {reason}; use 'xla', or None")
        return implementation
    _log_choice(form, "xla" if reason else MOSAIC_GPU, reason)
    return "xla" if reason else MOSAIC_GPU


def check_name(implementation: Implementation | None) -> None:
    """Raises ValueError for an implementation that there is not."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: expected None or one of {', '.join(IMPLEMENTATIONS)}"
        )


def check_form(op: Operation, form: Form | None, chunk_size: int | None) -> None:
    """The form exists, can compute the score, and takes a chunk size if one is given. Raises ValueError."""
    if form is not None and form not in FORMS:
        raise ValueError(f"form={form!r} is unknown: expected None or one of {', '.join(FORMS)}")
    if form == "recurrent" and not op.finite:
        raise ValueError(
            f"form='recurrent' needs a finite state, and score={op.score!r} has none: use form='chunked' or "
            "'parallel', or decay_attention_step with a key/value cache"
        )
    if chunk_size is not None and form in ("parallel", "recurrent"):
        raise ValueError(f"chunk_size={chunk_size} given for form={form!r}, which has no chunks: omit it")


def _tokens_of_a_device(q, axis: SequenceAxis | None) -> int:
    return q.shape[1] if axis is None else q.shape[1] // axis.size


def _fastest_of_kernels(op: Operation, q, v, axis: SequenceAxis | None, ask) -> Form | None:
    """The form in which the kernels are the fastest that there is, or None."""
    in_chunks, at_once = (refusal(functools.partial(ask, form)) is None for form in ("chunked", "parallel"))
    if at_once and _tokens_of_a_device(q, axis) <= load(MOSAIC_GPU).longest_parallel(op, q, v, in_chunks):
        return "parallel"
    return "chunked" if in_chunks else None


def _fewest_flops(op: Operation, size: int, head_dim: int, value_dim: int) -> Form:
    """Of XLA's forms: the parallel one costs 2 T (K + V) flops a token and head, the chunked 2 C (K + V) + 4 D V."""
    if not op.finite:
        return "parallel" if size <= LONGEST_PARALLEL_SOFTMAX else "chunked"
    state_flops = 4 * num_features(op.score, head_dim) * value_dim
    crossover = SCORES[op.score].chunk_size + state_flops / (2 * (head_dim + value_dim))
    return "parallel" if size <= crossover else "chunked"


@functools.cache
def _log_choice(form, implementation, reason) -> None:
    """Says once what None chose, for each form and reason."""
    why = f" (mosaic_gpu: {reason})" if reason else ""
    _log.info("decay_attention: form=%s, implementation=%s%s", form, implementation, why)
    if implementation == MOSAIC_GPU and jax.default_backend() == "gpu" and _spills():
        _log.warning(
            "JAX %s compiles the kernels with spilled registers: take JAX 0.11.2, or pip uninstall nvidia-nvjitlink "
            "(docs/measurements/jax_0_12.md)",
            jax.__version__,
        )


def _spills() -> bool:
    """Whether this JAX assembles kernels through libnvJitLink, which may be a package's or the system's."""
    if jax.__version_info__ < SPILLING_JAX:
        return False
    packages = {name.lower() for name in importlib.metadata.packages_distributions().get("nvidia", ())}
    return any("nvjitlink" in name for name in packages) or ctypes.util.find_library("nvJitLink") is not None

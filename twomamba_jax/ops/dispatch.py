"""The form and the implementation of a call: what is named runs or raises, and what is not is chosen here.

`xla` are the forms of `ops.forms`, for every call. `mosaic_gpu` and `triton` are kernels, which say of a call why they
cannot compute it, and are imported where there is a device for them.
"""

import ctypes.util
import functools
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from pallas_kernels import device as hopper
from pallas_kernels.triton import device as triton
from twomamba_jax.ops import xla
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.score import SCORES, num_features
from twomamba_jax.ops.sequence import SequenceAxis

Form = Literal["parallel", "chunked", "recurrent"]
FORMS = get_args(Form)
Implementation = Literal["xla", "mosaic_gpu", "triton"]
IMPLEMENTATIONS = get_args(Implementation)

# Of the kernels in each language, why there is no device for them, or None.
UNSUPPORTED_DEVICE = {"mosaic_gpu": hopper.unsupported_device, "triton": triton.unsupported_device}

# The parallel exponential form holds T^2 weights per head; beyond this many tokens the blockwise form is chosen.
LONGEST_PARALLEL_SOFTMAX = 2048

# From this version on kernels spill where libnvJitLink is there (docs/measurements/jax_0_12.md).
SPILLING_JAX = (0, 12)

_log = logging.getLogger("twomamba_jax")


def load(implementation: Implementation) -> Any:
    """An implementation: `xla`, which has `attend`, or `Kernels`, which also say what they cannot compute."""
    # Kernels are slow to import, and not there on every platform.
    if implementation == "mosaic_gpu":
        from twomamba_jax.ops.mosaic_gpu import MOSAIC_GPU

        return MOSAIC_GPU
    if implementation == "triton":
        from twomamba_jax.ops.triton import TRITON

        return TRITON
    return xla


def kernels_of_device() -> Implementation:
    """The kernels that are chosen on this machine where they can compute a call: Triton's on GPUs other than Hopper."""
    return "triton" if jax.default_backend() == "gpu" and not hopper.is_hopper() else "mosaic_gpu"


def refusal(implementation: Implementation, ask: Callable[[Any], str | None]) -> str | None:
    """Why kernels cannot do something here: for want of a device, or what `ask(kernels)` says; None if they can."""
    return UNSUPPORTED_DEVICE[implementation]() or ask(load(implementation))


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
    check_name(implementation)
    check_form(op, form, chunk_size)

    def ask(form, kernels):
        return kernels.unsupported(op, q, k, v, state, axis, chunk_size, form)

    if form is None and chunk_size:
        form = "chunked"
    if form is None and implementation != "xla":
        form = _fastest_of_kernels(implementation or kernels_of_device(), op, q, v, axis, ask)
    if form is None:
        form = _fewest_flops(op, _tokens_of_a_device(q, axis), q.shape[-1], v.shape[-1])
    return form, choose_implementation(implementation, form, functools.partial(ask, form))


def choose_implementation(
    implementation: Implementation | None, form: str, ask: Callable[[Any], str | None]
) -> Implementation:
    """The implementation named, or for None the device's kernels where they can compute the call; that is logged once.

    `ask` is as in `refusal`. Raises ValueError for an unknown implementation, and for kernels that are named and
    cannot.
    """
    check_name(implementation)
    if implementation == "xla":
        return implementation
    kernels = implementation or kernels_of_device()
    reason = refusal(kernels, ask)
    if implementation is None:
        _log_choice(form, kernels, reason)
    elif reason:
        raise ValueError(f"implementation={kernels!r} cannot compute this call: {reason}; use 'xla', or None")
    return "xla" if reason else kernels


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


def _fastest_of_kernels(kernels: Implementation, op: Operation, q, v, axis: SequenceAxis | None, ask) -> Form | None:
    """The form in which these kernels are the fastest that there is, or None."""
    in_chunks, at_once = (refusal(kernels, functools.partial(ask, form)) is None for form in ("chunked", "parallel"))
    if at_once and _tokens_of_a_device(q, axis) <= load(kernels).longest_parallel(op, q, v, in_chunks):
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
def _log_choice(form, kernels, reason) -> None:
    """Says once what None chose, for each form and reason."""
    chosen, why = (kernels, "") if reason is None else ("xla", f" ({kernels}: {reason})")
    _log.info("decay_attention: form=%s, implementation=%s%s", form, chosen, why)
    if chosen == "mosaic_gpu" and jax.default_backend() == "gpu" and _spills():
        _log.warning(
            "JAX %s compiles the kernels with spilled registers, and some take up to 1.4 times as long: install JAX "
            "0.11.2 (docs/measurements/jax_0_12.md)",
            jax.__version__,
        )


def _spills() -> bool:
    """Whether this JAX assembles kernels through libnvJitLink, which may be a package's or the system's."""
    if jax.__version_info__ < SPILLING_JAX:
        return False
    packages = {name.lower() for name in importlib.metadata.packages_distributions().get("nvidia", ())}
    return any("nvjitlink" in name for name in packages) or ctypes.util.find_library("nvJitLink") is not None

"""The Triton kernels as those that quadratic attention takes."""

from pallas_kernels.quadratic.attention import Kernels
from pallas_kernels.quadratic.operands import Problem
from pallas_kernels.triton.device import capability
from pallas_kernels.triton.quadratic.backward_keys import backward_keys
from pallas_kernels.triton.quadratic.backward_queries import backward_queries
from pallas_kernels.triton.quadratic.forward import forward
from pallas_kernels.triton.quadratic.tiles import Tuning, tuning


def _forward(problem: Problem, tuning: Tuning, *arrays, save_norm: bool):
    return forward(problem, tuning.forward, *arrays, save_norm=save_norm)


def _backward_queries(problem: Problem, tuning: Tuning, *arrays):
    return backward_queries(problem, tuning.queries, *arrays)


def _backward_keys(problem: Problem, tuning: Tuning, *arrays):
    return backward_keys(problem, tuning.keys, *arrays)


def _tuning(score: str, head_dim: int, tokens: int) -> Tuning:
    return tuning(capability(), score, head_dim)


KERNELS = Kernels(_forward, _backward_queries, _backward_keys, _tuning, float16=True)

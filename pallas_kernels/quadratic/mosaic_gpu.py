"""The quadratic kernels in Pallas Mosaic GPU, for Hopper."""

from pallas_kernels.device import device_kind, multiprocessors
from pallas_kernels.quadratic import tuning
from pallas_kernels.quadratic.attention import Kernels
from pallas_kernels.quadratic.backward_keys import backward_keys
from pallas_kernels.quadratic.backward_queries import backward_queries
from pallas_kernels.quadratic.forward import forward


def _programs(tuning) -> int:
    return tuning.programs or multiprocessors()


def _forward(problem, tuning, *arrays, save_norm):
    return forward(problem, tuning.forward, _programs(tuning), *arrays, save_norm=save_norm)


def _backward_queries(problem, tuning, *arrays):
    return backward_queries(problem, tuning.queries, _programs(tuning), *arrays, late_delta=tuning.keys.lean)


def _backward_keys(problem, tuning, *arrays):
    return backward_keys(problem, tuning.keys, _programs(tuning), *arrays)


def _tuning(score: str, head_dim: int, tokens: int):
    return tuning.tuning(device_kind(), score, head_dim, tokens)


KERNELS = Kernels(_forward, _backward_queries, _backward_keys, _tuning)

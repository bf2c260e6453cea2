"""What a tensor of a checkpoint holds, as data: which parameters of a `LanguageModel`, in which of its rows.

A checkpoint of PyTorch keeps a linear map as [out, in] and fuses several maps along `out`. The parameters here are
[in, out], with heads and their sizes apart, and those of equal layers are stacked. One description serves both ways.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from train.restore import parameter_shapes
from twomamba_jax.config import ModelConfig
from twomamba_jax.layers import LanguageModel


@dataclass(frozen=True)
class Parameter:
    """One array of a model, or one layer's part of a stack: `path` in the tree, and the `layer` of its stack, or None.

    `shape` is without the axis of the layers.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    def of(self, tree: Mapping[str, Any]) -> Any:
        """Its values in a tree of parameters: of a NumPy array a view, which can be assigned to."""
        array: Any = tree
        for name in self.path:
            array = array[name]
        return array if self.layer is None else array[self.layer]


@dataclass(frozen=True)
class Part:
    """`rows` of a tensor's first dimension hold a parameter: in its own order, or `transposed`, as [rows, the rest].

    A transposed parameter's last dimensions are the rows: [E, H, K] is [H K, E] there, and [H, K, E] is [E, H K].
    """

    parameter: Parameter
    rows: int
    transposed: bool

    def unpack(self, rows: np.ndarray) -> np.ndarray:
        """The parameter, from its rows [rows, ...]."""
        flat = rows.reshape(self.rows, -1)
        return (flat.T if self.transposed else flat).reshape(self.parameter.shape)

    def pack(self, values: np.ndarray) -> np.ndarray:
        """The rows [rows, ...] flat, from the parameter; the converse of `unpack`."""
        if self.transposed:
            return values.reshape(-1, self.rows).T
        return values.reshape(self.rows, -1)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: its shape, and its parts, one after the other along the first dimension."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def unpack(self, values: np.ndarray) -> Iterator[tuple[Parameter, np.ndarray]]:
        """Each parameter and its values, views of `values` where they can be."""
        start = 0
        for part in self.parts:
            yield part.parameter, part.unpack(values[start : start + part.rows])
            start += part.rows

    def pack(self, tree: Mapping[str, Any]) -> np.ndarray:
        """The tensor, from a tree of parameters."""
        rows = [part.pack(np.asarray(part.parameter.of(tree))) for part in self.parts]
        return np.ascontiguousarray(rows[0] if len(rows) == 1 else np.concatenate(rows)).reshape(self.shape)


def linear(*parameters: Parameter, rows: int | None = None) -> Tensor:
    """A weight [out, in] of maps that share their input, x [E] or, with `rows` outputs, x [H, V].

    Without `rows` the first dimension of each parameter is the input's and all the others are rows.
    """
    parts = tuple(Part(one, rows or math.prod(one.shape[1:]), True) for one in parameters)
    (columns,) = {math.prod(one.shape) // part.rows for one, part in zip(parameters, parts)}
    return Tensor((sum(part.rows for part in parts), columns), parts)


def vector(*parameters: Parameter) -> Tensor:
    """Parameters one after the other, flat, in their own order: biases and scales."""
    parts = tuple(Part(one, math.prod(one.shape), False) for one in parameters)
    return Tensor((sum(part.rows for part in parts),), parts)


def same(parameter: Parameter) -> Tensor:
    """The parameter as it is."""
    return Tensor(parameter.shape, (Part(parameter, parameter.shape[0], False),))


@dataclass(frozen=True)
class Layers:
    """The parameters of a model by name: those outside the layers by path, those of layer n by path below the layer."""

    config: ModelConfig

    def outside(self, *path: str) -> Parameter:
        """A parameter outside of all layers."""
        return Parameter(path, None, self._shape(path))

    def of(self, layer: int) -> dict[str, Parameter]:
        """The parameters of a layer by their paths with dots, such as `mixer.q.kernel`."""
        ends = np.cumsum([count for _, count in self.config.layer_runs])
        index = int(np.searchsorted(ends, layer, side="right"))
        run, first = f"layers_{index}", int(ends[index]) - self.config.layer_runs[index][1]
        leaves = jax.tree.leaves_with_path(self._shapes[run])
        paths = [tuple(key.key for key in path) for path, _ in leaves]
        return {
            ".".join(path): Parameter((run, *path), layer - first, leaf.shape[1:])
            for path, (_, leaf) in zip(paths, leaves)
        }

    def __post_init__(self):
        object.__setattr__(self, "_shapes", parameter_shapes(LanguageModel(self.config)))

    def _shape(self, path: tuple[str, ...]) -> tuple[int, ...]:
        shape: Any = self._shapes
        for name in path:
            shape = shape[name]
        return shape.shape

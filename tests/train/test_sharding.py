"""The mesh, and what it refuses."""

from typing import NamedTuple

import pytest
from jax.sharding import AbstractMesh

from train.configuration import apply_overrides, load_config
from train.errors import UserError
from train.sharding import MESH_AXES, check_dimensions, make_mesh, mesh_shape, rows_of_process


def sizes(data=1, fsdp=1, tensor=1, sequence=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}


def test_mesh_shape():
    assert mesh_shape(sizes(data=-1), 8) == (8, 1, 1, 1)
    assert mesh_shape(sizes(data=2, tensor=-1), 8) == (2, 1, 4, 1)
    assert mesh_shape(sizes(2, 2, 1, 2), 8) == (2, 2, 1, 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (sizes(data=3), "do not multiply to the number of devices, 8"),
        (sizes(data=-1, fsdp=3), "do not multiply"),
        (sizes(data=4), "do not multiply"),
        (sizes(data=-1, fsdp=-1), "one of them may be -1"),
        (sizes(data=0), "each must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(shape, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(shape, 8)


def test_a_mesh_of_one():
    mesh = make_mesh(sizes(data=-1))
    assert dict(mesh.shape) == sizes()


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (sizes(data=2, fsdp=2), {"batch_size": 6}, "batch_size=6 must be a multiple of mesh.data x mesh.fsdp = 4"),
        (sizes(sequence=8), {"length": 260}, "length=260 must be a multiple of mesh.sequence = 8"),
        (sizes(fsdp=8), {"model.d_model": 132}, "model.d_model=132 must be a multiple of mesh.fsdp = 8"),
        (sizes(tensor=4), {}, "model.num_heads=2 must be a multiple of mesh.tensor = 4: change one of them"),
        (
            sizes(tensor=2),
            {"model.num_kv_heads": 1},
            "model.num_kv_heads=1 must be a multiple of mesh.tensor = 2",
        ),
        (sizes(tensor=2), {"model.mlp_dim": 255}, "model.mlp_dim=255 must be a multiple of mesh.tensor = 2"),
        (sizes(tensor=2), {"model.vocab_size": 257}, "model.vocab_size=257 must be a multiple of mesh.tensor = 2"),
    ],
)
def test_dimensions_that_a_mesh_cannot_cut(mesh, changes, message):
    config = load_config("configs/2mamba.py")
    apply_overrides(config, [(key, str(value)) for key, value in changes.items()])
    with pytest.raises(UserError, match=message):
        check_dimensions(config, AbstractMesh(tuple(mesh.values()), MESH_AXES))


class Device(NamedTuple):
    process_index: int
    id: int


class Devices:
    """A sharding over devices of several processes: which rows each of them holds."""

    def __init__(self, parts, **mesh):
        self.mesh = AbstractMesh(tuple((sizes() | mesh).values()), MESH_AXES)
        self._parts = parts

    def devices_indices_map(self, shape):
        return {Device(process, number): (rows, slice(None)) for number, (process, rows) in enumerate(self._parts)}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(0, slice(None)), (1, slice(None))], [(0, 1), (0, 1)]),  # tensor or sequence over the processes
        ([(0, slice(0, 4)), (1, slice(4, 8))], [(0, 2), (1, 2)]),
        ([(0, slice(4, 8)), (1, slice(0, 2)), (1, slice(2, 4))], [(1, 2), (0, 2)]),
        ([(0, slice(0, 4)), (1, slice(0, 4)), (2, slice(4, 8)), (3, slice(4, 8))], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_a_process_has_the_rows_that_its_devices_hold(parts, expected):
    assert [rows_of_process(Devices(parts), 8, process) for process in range(len(expected))] == expected


def test_rows_that_overlap_between_processes_are_refused():
    # Two processes of three devices each, tensor 2: the middle rows are on both.
    parts = [(0, slice(0, 2)), (0, slice(0, 2)), (0, slice(2, 4)), (1, slice(2, 4)), (1, slice(4, 6)), (1, slice(4, 6))]
    with pytest.raises(UserError, match="gives the 2 processes rows that overlap or are not equally many"):
        rows_of_process(Devices(parts, data=3, tensor=2), 6, 0)

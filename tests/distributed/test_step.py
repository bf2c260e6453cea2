"""On 8 devices the loss and a step in microbatches are those of one, and no token and no logit leaves its device."""

import numpy as np
import pytest

WIDTH, VOCAB, CHUNK = 16, 64, 4  # as in step_collectives.py


@pytest.fixture(scope="module")
def found(simulate):
    return simulate("step_collectives.py")


def in_loops(collectives, loop: bool):
    """The (kind, number of elements) of each result of those in a loop, or of the others."""
    return [(one["kind"], size) for one in collectives if one["loop"] == loop for _, size in one["arrays"]]


@pytest.mark.parametrize("mesh", ["rows", "all axes", "one pass"])
def test_the_mesh_changes_the_rounding_of_the_loss_alone(found, mesh):
    for figures, expected in zip(found[mesh]["figures"], found["alone"], strict=True):
        np.testing.assert_allclose(figures, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_loss_needs_nothing_of_other_devices_until_its_last_chunk(found):
    """Then dW is summed over them, once. Before it the head, which fsdp has cut, is put together, once."""
    collectives = found["rows"]["collectives"]
    assert in_loops(collectives, True) == []
    outside = in_loops(collectives, False)
    assert sorted(one for one in outside if one[1] > 1) == [
        ("all-gather", WIDTH * VOCAB),
        ("all-reduce", WIDTH * VOCAB),
    ]


def test_a_vocabulary_over_devices_costs_a_chunk_its_dx_and_a_few_numbers_a_token(found):
    sizes = in_loops(found["all axes"]["collectives"], True)
    assert {kind for kind, _ in sizes} == {"all-reduce"}
    assert sorted(size for _, size in sizes) == [CHUNK] * 4 + [CHUNK * WIDTH]
    # In one pass each device's part of a row is gathered, not summed: four numbers for each of two devices.
    *parts, largest = sorted(size for _, size in in_loops(found["one pass"]["collectives"], True))
    assert largest == CHUNK * WIDTH
    assert max(parts) <= 2 * CHUNK


def test_microbatches_change_the_rounding_alone(found):
    one, two = found["steps"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


def test_no_row_of_a_microbatch_changes_its_device(found):
    """Parameters are gathered and their gradients summed: the largest has 32 x 48 numbers, 8 rows' activations more."""
    _, two = found["steps"]
    assert {one["kind"] for one in two["collectives"]} == {"all-gather", "all-reduce"}
    arrays = [array for one in two["collectives"] for array in one["arrays"]]
    assert {dtype for dtype, _ in arrays} == {"f32"}
    assert max(size for _, size in arrays) == 32 * 48

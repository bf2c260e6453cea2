"""State tracking: products against permutations that are applied, parity against counts."""

import itertools

import numpy as np
import pytest

from train.data.state_tracking import StateTrackingRows, permutation_products
from train.errors import UserError

PERMUTATIONS = sorted(itertools.permutations(range(5)))


def make(**changes) -> StateTrackingRows:
    sizes = {"seed": 0, "split": "train", "num_rows": 1000, "group": "s5", "lengths": (3, 9)}
    return StateTrackingRows(**sizes | changes)


def test_s5_targets_are_the_products_so_far():
    rows, lengths = make(), set()
    assert (rows.length, rows.num_tokens) == (9, 121)
    for row in map(rows.__getitem__, range(200)):
        size = int(row["segment_ids"].sum())
        lengths.add(size)
        for end in range(1, size + 1):
            # The last of the word acts first.
            places = [0, 1, 2, 3, 4]
            for element in row["tokens"][:end][::-1]:
                places = [PERMUTATIONS[element][place] for place in places]
            assert PERMUTATIONS[row["targets"][end - 1]] == tuple(places)
        assert (row["tokens"][size:] == 120).all()
        assert row["weights"].tolist() == row["segment_ids"].tolist() == [1] * size + [0] * (9 - size)
    assert lengths == set(range(3, 10))


def test_product_of_a_swap_and_a_cycle_is_the_known_one():
    swap, cycle = PERMUTATIONS.index((1, 0, 2, 3, 4)), PERMUTATIONS.index((1, 2, 3, 4, 0))
    products = permutation_products(5)
    assert PERMUTATIONS[products[swap, cycle]] == (0, 2, 3, 4, 1)
    assert PERMUTATIONS[products[cycle, swap]] == (2, 1, 3, 4, 0)
    assert products[swap, swap] == products[0, 0] == 0
    assert products[0].tolist() == products[:, 0].tolist() == list(range(120))


def test_parity_asks_for_the_last_sum_alone():
    rows, bits = make(group="parity"), []
    assert rows.num_tokens == 3
    for row in map(rows.__getitem__, range(500)):
        size = int(row["segment_ids"].sum())
        word = row["tokens"][:size].tolist()
        assert row["targets"][:size].tolist() == [sum(word[:end]) % 2 for end in range(1, size + 1)]
        assert np.flatnonzero(row["weights"]).tolist() == [size - 1]
        assert row["weights"][size - 1] == 1
        assert (row["tokens"][size:] == 2).all()
        bits += word
    assert np.mean(bits) == pytest.approx(0.5, abs=2 / len(bits) ** 0.5)


def test_words_depend_on_seed_split_and_index_alone():
    row = make()[7]["tokens"]
    assert np.array_equal(make()[7]["tokens"], row)
    for other in (make()[8], make(seed=1)[7], make(split="held_out")[7]):
        assert not np.array_equal(other["tokens"], row)
    assert make().digest() == make().digest() != make(split="held_out").digest()
    train, held_out = (
        {make(split=split, lengths=(9, 9))[index]["tokens"].tobytes() for index in range(300)}
        for split in ("train", "held_out")
    )
    assert len(train) == len(held_out) == 300
    assert not train & held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "s6"}, "unknown group 's6'; did you mean 's5'?"),
        ({"lengths": (0, 4)}, r"lengths=\(0, 4\) must be a range \(shortest, longest\) from 1"),
        ({"lengths": (5, 4)}, r"lengths=\(5, 4\) must be a range"),
    ],
)
def test_words_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)

"""Copying: the form of its rows, and that a row is a function of its index."""

import numpy as np
import pytest

from train.data.copying import CopyingRows
from train.errors import UserError


def make(**changes) -> CopyingRows:
    return CopyingRows(**{"seed": 0, "split": "train", "num_rows": 1000, "lengths": (2, 6), "symbols": 5} | changes)


def test_copying_row_repeats_its_string_and_ends():
    rows, lengths, letters = make(), [], []
    assert (rows.length, rows.num_tokens) == (14, 9)
    for row in map(rows.__getitem__, range(500)):
        tokens = [*row["tokens"].tolist(), int(row["targets"][-1])]
        assert row["targets"].tolist() == tokens[1:]
        separator, end = tokens.index(6), tokens.index(7)
        string = tokens[1:separator]
        assert tokens == [5, *string, 6, *string, 7] + [8] * (14 - end)
        assert set(string) <= set(range(5))
        assert row["targets"][row["weights"] == 1].tolist() == [*string, 7]
        assert set(row["weights"].tolist()) == {0, 1}
        assert row["segment_ids"].tolist() == [1] * min(end + 1, 14) + [0] * (13 - end)
        lengths.append(len(string))
        letters += string
    assert np.bincount(lengths)[2:] == pytest.approx([100] * 5, abs=4 * 9)  # 9: sqrt(500 / 5 * 4 / 5)
    assert np.bincount(letters) / len(letters) == pytest.approx([0.2] * 5, abs=4 * 0.4 / len(letters) ** 0.5)


def test_copying_row_depends_on_seed_split_and_index_alone():
    rows = {name: make(lengths=(20, 20), **changes) for name, changes in
            {"same": {}, "seed": {"seed": 1}, "split": {"split": "held_out"}}.items()}  # fmt: skip
    row = make(lengths=(20, 20))[7]["tokens"]
    assert np.array_equal(rows["same"][7]["tokens"], row)
    for other in (rows["same"][8], rows["seed"][7], rows["split"][7]):
        assert not np.array_equal(other["tokens"], row)
    assert rows["same"].digest() == make(lengths=(20, 20)).digest() != rows["split"].digest()
    train, held_out = ({rows[split][index]["tokens"].tobytes() for index in range(300)} for split in ("same", "split"))
    assert len(train) == len(held_out) == 300
    assert not train & held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (0, 4)}, r"lengths=\(0, 4\) must be a range \(shortest, longest\) from 1"),
        ({"lengths": (5, 4)}, r"lengths=\(5, 4\) must be a range"),
        ({"symbols": 0}, "symbols=0 must be at least 1"),
    ],
)
def test_copying_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)

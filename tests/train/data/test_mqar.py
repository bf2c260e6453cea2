"""MQAR: rows against the definition, the law of the gaps, and that a row is a function of its index."""

import numpy as np
import pytest

from train.data.mqar import MQARRows
from train.errors import UserError

SIZES = {"length": 24, "num_rows": 1000, "pairs": (3,), "vocab_size": 40}


def make(**changes) -> MQARRows:
    return MQARRows(**{"seed": 0, "split": "train", **SIZES, **changes})


def slots_of(rows, count):
    """Of each row, the slots of its queries, key by key, [count, N]; found by looking for the keys behind the pairs."""
    found = []
    for row in map(rows.__getitem__, range(count)):
        tokens, context = row["tokens"].tolist(), 2 * int(row["weights"].sum())
        found.append([(tokens.index(key, context) - context) // 2 for key in tokens[0:context:2]])
    return np.array(found)


@pytest.mark.parametrize("random_filler", [False, True])
def test_query_has_the_value_that_follows_its_key(random_filler):
    rows, others = make(random_filler=random_filler), set()
    for row in map(rows.__getitem__, range(300)):
        tokens, targets = row["tokens"].tolist(), row["targets"].tolist()
        keys, values = tokens[0:6:2], tokens[1:6:2]
        assert len(set(keys)) == len(set(values)) == 3
        assert 1 <= min(keys) <= max(keys) < 20 <= min(values) <= max(values) < rows.num_tokens == 40
        (queries,) = np.nonzero(row["weights"] == 1)
        assert sorted(tokens[place] for place in queries) == sorted(keys)
        for place in queries:
            assert place >= 6
            assert place % 2 == 0
            assert targets[place] == tokens[tokens.index(tokens[place]) + 1]
        rest = np.setdiff1d(np.arange(24), queries)
        assert not row["targets"][rest].any()
        assert not row["weights"][rest].any()
        assert (row["segment_ids"] == 1).all()
        others |= set(row["tokens"][np.setdiff1d(rest, np.arange(6))].tolist())
    assert others == (set(range(40)) if random_filler else {0})


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_gaps_follow_the_power_law_drawn_without_replacement(power_a):
    count = 1500
    slots = slots_of(make(length=18, pairs=(2,), power_a=power_a), count)
    weights = np.array([(slot + 1) ** (power_a - 1) for slot in range(7)])
    first = weights / weights.sum()
    second = np.array(
        [
            sum(first[other] * first[slot] / (1 - first[other]) for other in range(7) if other != slot)
            for slot in range(7)
        ]
    )
    for key, expected in enumerate((first, second)):
        share = np.bincount(slots[:, key], minlength=7) / count
        assert np.abs(share - expected).max() < 4 * np.sqrt(expected * (1 - expected) / count).max()


def test_mixture_has_its_numbers_of_pairs_equally_often():
    rows = make(pairs=(1, 2, 6))
    counts = [int(rows[index]["weights"].sum()) for index in range(9)]
    assert counts == [1, 2, 6] * 3


def test_mqar_row_depends_on_seed_split_and_index_alone():
    row = make()[7]["tokens"]
    assert np.array_equal(make()[7]["tokens"], row)
    for other in (make()[8], make(seed=1)[7], make(split="held_out")[7]):
        assert not np.array_equal(other["tokens"], row)
    assert make().digest() == make().digest()
    assert make().digest() != make(power_a=1.0).digest() != make(split="held_out").digest()


def test_mqar_splits_share_no_row():
    train, held_out = (
        {make(split=split)[index]["tokens"].tobytes() for index in range(500)} for split in ("train", "held_out")
    )
    assert len(train) == len(held_out) == 500
    assert not train & held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": ()}, r"pairs=\(\) must be one or more numbers of at least 1"),
        ({"pairs": (3, 0)}, r"pairs=\(3, 0\) must be"),
        ({"pairs": (3, 7)}, "length=24 is too short for pairs=7: it must be at least 28"),
        ({"vocab_size": 7}, "vocab_size=7 is too small for pairs=3: .* at least 8"),
        ({"power_a": 0.0}, "power_a=0.0 must be positive"),
    ],
)
def test_mqar_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)
    assert make(length=12, vocab_size=8)[0]["weights"].sum() == 3

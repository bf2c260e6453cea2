"""The recall task: the form of its rows, and that a row is a function of its index."""

import numpy as np
import pytest

from train.data.recall import RecallRows
from train.data.rows import training_batches
from train.errors import UserError

SIZES = {"length": 40, "num_rows": 1000, "symbols": 20, "repeat": 10, "fillers": 5, "gap": (3, 9), "graded": False}


def make(**changes) -> RecallRows:
    return RecallRows(**{"seed": 0, "split": "train", **SIZES, **changes})


def test_rows_have_the_form_that_the_docstring_says():
    rows, gaps = make(), set()
    for index in range(300):
        row = rows[index]
        tokens = np.append(row["tokens"], row["targets"][-1])
        assert np.array_equal(tokens[1:], row["targets"])
        (markers,) = np.nonzero(tokens == rows.marker)
        string = tokens[1:11]
        gap = tokens[11 : markers[1]]
        gaps.add(gap.size)
        assert markers[0] == 0
        assert len(set(string.tolist())) == 10
        assert string.max() < 20
        assert ((gap >= 20) & (gap < 25)).all()
        assert np.array_equal(tokens[markers[1] + 1 : markers[1] + 11], string)
        assert (tokens[markers[1] + 11 :] == rows.marker + 1).all()
        assert np.array_equal(row["targets"][row["weights"] == 1], string)
        assert row["weights"].sum() == 10
        assert tokens.max() < rows.num_tokens
    assert gaps == set(range(3, 10))


def test_a_row_depends_on_seed_split_and_index_alone():
    row = make()[7]["tokens"]
    assert np.array_equal(make()[7]["tokens"], row)
    for other in (make()[8], make(seed=1)[7], make(split="held_out")[7]):
        assert not np.array_equal(other["tokens"], row)
    assert make().digest() == make().digest()
    assert make().digest() != make(gap=(3, 8)).digest()


def test_batches_resume_at_their_position():
    batches = training_batches(make(), batch_size=8, seed=0)
    for _ in range(3):
        next(batches)
    position, expected = batches.get_state(), next(batches)["tokens"]
    batches.close()
    resumed = training_batches(make(), batch_size=8, seed=0)
    resumed.set_state(position)
    assert np.array_equal(next(resumed)["tokens"], expected)
    resumed.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeat": 21}, "data.repeat=21 must be from 1 to data.symbols=20"),
        ({"fillers": 0}, "data.fillers=0"),
        ({"gap": (5, 4)}, r"data.gap=\(5, 4\)"),
        ({"gap": (1.5, 4)}, r"data.gap=\(1.5, 4\)"),
        ({"gap": [3]}, r"data.gap=\[3\]"),
        ({"length": 29}, "length=29 is too short: the longest problem has 30 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)
    assert make(length=30)[0]["tokens"].shape == (30,)


def test_graded_rows_are_full_of_problems_of_all_lengths_short_ones_more_often():
    rows = make(graded=True)
    first_strings, first_gaps, problems = [], [], []
    for index in range(1000):
        row = rows[index]
        tokens = np.append(row["tokens"], row["targets"][-1])
        weights = np.append(0, row["weights"])
        # The last token's segment is not in the row: it is the last problem's, or padding.
        segment_ids = np.append(row["segment_ids"], row["segment_ids"][-1] * (tokens[-1] != rows.marker + 1))
        assert (tokens[segment_ids == 0] == rows.marker + 1).all()
        assert np.all(np.diff(segment_ids[segment_ids > 0]) >= 0)
        problems.append(segment_ids.max())
        for number in range(1, segment_ids.max() + 1):
            problem, marks = tokens[segment_ids == number], weights[segment_ids == number]
            repeat = int(marks.sum())
            assert problem[0] == problem[-repeat - 1] == rows.marker
            assert np.array_equal(problem[-repeat:], problem[1 : repeat + 1])
            assert marks.tolist() == [0] * (problem.size - repeat) + [1] * repeat
            if number == 1:
                first_strings.append(repeat)
                first_gaps.append(problem.size - 2 * repeat - 2)
    assert max(problems) > 3
    assert set(first_strings) == set(range(1, 11))
    assert set(first_gaps) == set(range(10))
    # P(1) = log 2 / log 11
    assert np.mean(np.array(first_strings) == 1) == pytest.approx(np.log(2) / np.log(11), abs=0.05)
    assert np.mean(np.array(first_gaps) == 0) == pytest.approx(np.log(2) / np.log(11), abs=0.05)

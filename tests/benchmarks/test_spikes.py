"""`benchmarks/spikes.py`: the alignment of queries, their gradients by layer, and the lines of the largest."""

import jax.numpy as jnp
import numpy as np
import pytest
import spikes
from support.exhaustive import exhaustive

from configs import base

TINY = {"d_model": 8, "num_layers": 2, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, "vocab_size": 257}


def test_alignment_is_the_mean_cos2_by_decay_and_square():
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 1, 6, 2, 4))
    log_decay = -random.uniform(0.1, 1, (1, 6, 2))
    segments = np.array([[0, 0, 0, 1, 1, 1]])
    found = np.asarray(spikes.alignment(*map(jnp.asarray, (q, k, log_decay, segments))))
    for head in range(2):
        for i in range(6):
            weights, cosines = [], []
            for j in range(3 * (i // 3), i + 1):
                length = np.linalg.norm(k[0, j, head])
                weights.append(np.exp(log_decay[0, j + 1 : i + 1, head].sum()) * length**2)
                cosines.append(q[0, i, head] @ k[0, j, head] / np.linalg.norm(q[0, i, head]) / length)
            assert found[0, i, head] == pytest.approx(np.average(np.square(cosines), weights=weights), rel=1e-5)


def test_lines_are_of_the_largest_gradients():
    gradients, alignments = np.ones((2, 1, 4, 1)), np.full((2, 1, 4, 1), 0.25)
    gradients[1, 0, 2, 0], alignments[1, 0, 2, 0], gradients[0, 0, 0, 0] = 30, 1e-6, 2
    lines = spikes.table(spikes.Queries(gradients, alignments), np.array([list(b"ab\tc")]), 2)
    assert lines[0] == r"| 1 | 0 | 30 | 1.00 | 1.0e-06 | 2.5e-01 | b'ab\t' |"
    assert lines[1] == "| 0 | 0 | 2 | 0.57 | 2.5e-01 | 2.5e-01 | b'a' |"


@exhaustive("the alignments and the lines above")
def test_run_shows_the_steps_above_the_norm(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(base.SIZES, "nano", TINY)
    for number in range(60):
        (tmp_path / f"file{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 40)
    seen = []
    table = spikes.table
    monkeypatch.setattr(spikes, "table", lambda queries, *rest: seen.append(queries) or table(queries, *rest))
    command = ["--data", str(tmp_path / "*.txt"), "--steps", "4", "--until", "2", "--above", "0", "--tokens", "3"]
    assert spikes.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("step")] == ["step 1", "step 2"]
    assert len(lines) == 2 + 2 * (1 + 3)
    for queries in seen:
        assert queries.gradients.shape == queries.alignments.shape == (2, 8, 256, 2)
        # A first token sees itself alone: its weight, whatever the query, cancels.
        assert np.all(queries.gradients[:, :, 0] < 1e-6 * queries.gradients.max())
        assert np.all((queries.alignments >= 0) & (queries.alignments <= 1 + 1e-5))


def test_mistake_is_one_line(tmp_path, capsys):
    assert spikes.main(["--data", str(tmp_path / "none.txt")]) == 2
    assert capsys.readouterr().err.startswith("error: data.paths")

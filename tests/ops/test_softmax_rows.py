"""What a cross entropy takes of each row of logits, in one pass and in several."""

import jax
import numpy as np

from twomamba_jax.ops.softmax_rows import in_one_pass, in_several_passes


def test_one_pass_is_several():
    """Logits of any size, ties and a row of NaN: what is not summed is the same, bit for bit."""
    random = np.random.default_rng(0)
    logits = np.float32(random.normal(size=(3, 7, 300)) * np.array([1, 1e3, 5e37])[:, None, None])
    logits[0, 0], logits[0, 1, 5:9], logits[0, 2], logits[0, 3, 4] = 2, 9, -3e38, np.nan
    targets = random.integers(300, size=(3, 7))
    passes = in_several_passes, in_one_pass
    several, one = (jax.tree.map(np.asarray, jax.jit(rows)(logits, targets)) for rows in passes)
    assert np.isnan(one.total[0, 3])
    assert np.isnan(several.total[0, 3])
    numbers = np.ones((3, 7), bool)
    numbers[0, 3] = False
    for found, wanted, tolerance in zip(one, several, (0, 2e-6, 0, 0)):
        np.testing.assert_allclose(found[numbers], wanted[numbers], rtol=tolerance)
    assert tuple(one.first_largest[0, :2]) == (0, 5)

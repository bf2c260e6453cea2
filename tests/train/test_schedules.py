"""The learning rate at the corners of each schedule, between them, and what is refused."""

import pytest

from train.errors import UserError
from train.schedules import make_schedule

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # The paper's: rates at the start, in the warm-up, at its end, and down to 0.
        (
            ("linear", 1e-4, 10_000, 1_000_000),
            {0: 0, 5000: 5e-5, 10_000: 1e-4, 100_000: 1e-4 * 90 / 99, 505_000: 5e-5, 1_000_000: 0, 2_000_000: 0},
        ),
        (("linear", 2.0, 10, 30, 0.1), {0: 0, 9: 1.8, 10: 2, 20: 1.1, 30: 0.2, 99: 0.2}),
        (("cosine", 2.0, 10, 30), {0: 0, 5: 1, 10: 2, 15: 1 + 0.5**0.5, 20: 1, 25: 1 - 0.5**0.5, 30: 0, 99: 0}),
        (("cosine", 2.0, 10, 30, 0.5), {5: 1, 10: 2, 20: 1.5, 30: 1, 99: 1}),
        (("wsd", 2.0, 10, 30, 0.0, 8), {0: 0, 5: 1, 10: 2, 22: 2, 24: 1.5, 26: 1, 30: 0, 99: 0}),
        (("wsd", 2.0, 10, 30, 0.25, 8), {10: 2, 22: 2, 26: 1.25, 30: 0.5, 99: 0.5}),
        (("wsd", 2.0, 10, 30, 0.0, 20), {10: 2, 20: 1, 30: 0}),
        # No warm-up starts at the peak; a run shorter than its warm-up rises to its end.
        (("linear", 2.0, 0, 10), {0: 2, 5: 1, 10: 0}),
        (("cosine", 1.0, 100, 20), {0: 0, 10: 0.1, 20: 0.2}),
    ],
    ids=str,
)
def test_rates(arguments, expected):
    schedule = make_schedule(*arguments)
    rates = {step: float(schedule(step)) for step in expected}
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-7 * arguments[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wsdd", 1.0, 0, 10), "unknown optimizer.schedule 'wsdd'; did you mean 'wsd'?"),
        (("linear", 1.0, -1, 10), "optimizer.warmup_steps=-1 must not be negative"),
        (("linear", 1.0, 0, 0), "optimizer.decay_steps=0, must be at least 1"),
        (("linear", 1.0, 0, 10, 1.5), "optimizer.final_fraction=1.5 must be from 0 to 1"),
        (("linear", 1.0, 0, 10, 0.0, 5), "optimizer.cooldown_steps=5 does not go with optimizer.schedule='linear'"),
        (("wsd", 1.0, 0, 10), "optimizer.cooldown_steps=None does not go with optimizer.schedule='wsd'"),
        (("wsd", 1.0, 0, 10, 0.0, 0), "optimizer.cooldown_steps=0 must be from 1"),
        (("wsd", 1.0, 6, 10, 0.0, 5), "to the steps between warm-up and end, 10 - 6"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        make_schedule(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

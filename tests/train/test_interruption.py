"""Which signals ask a run to save and stop."""

import os
import signal

import pytest

from train.configuration import load_config
from train.interruption import SIGNALS, Interruption
from train.sharding import make_mesh


@pytest.fixture
def interruption():
    return Interruption(make_mesh(load_config("configs/2mamba.py").mesh))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_asks_to_save_and_stop(interruption, name):
    number = signal.Signals[name]
    assert number in SIGNALS  # else it would end the tests
    before = signal.getsignal(number)
    with interruption:
        assert not interruption.agreed()
        os.kill(os.getpid(), number)
        assert interruption.agreed()
    assert signal.getsignal(number) == before


def test_a_hangup_that_is_ignored_stays_ignored(interruption):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)

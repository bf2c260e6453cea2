"""A device that runs out of memory: one line that says how much was missing, and what to do."""

import jax
import jax.numpy as jnp
import pytest

from train import evaluate, generate, main
from train.errors import UserError
from train.memory import enough_memory

ERROR = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 40.16GiB with allocator")


def test_too_large_an_array_is_the_users_to_put_right():
    with (
        pytest.raises(
            UserError, match=r"^the device has too little memory \(\d+ bytes more was asked for\): do less; "
        ),
        enough_memory("do less"),
    ):
        jax.block_until_ready(jnp.zeros(2**45))


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), enough_memory("do less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")


@pytest.mark.parametrize(
    ("program", "name", "arguments", "advice"),
    [
        (main, "run", ["--config", "configs/2mamba.py"], "make --config.batch_size or --config.length smaller"),
        (generate, "run", ["--workdir", "w", "--prompt", "p"], "make --num_samples, --prefill_size or --max_length"),
        (evaluate, "evaluate_run", ["--workdir", "w"], "make --config.batch_size or --config.length smaller"),
    ],
    ids=["train", "generate", "evaluate"],
)
def test_the_command_lines_end_in_one_line(program, name, arguments, advice, monkeypatch, capsys):
    def exhausted(*_):
        raise ERROR

    monkeypatch.setattr(program, name, exhausted)
    assert program.main(arguments) == 2
    assert capsys.readouterr().err.startswith(
        f"error: the device has too little memory (40.16GiB more was asked for): {advice}"
    )

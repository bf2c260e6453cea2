"""The commands of docs/measurements/fineweb.md: each is a whole configuration of the model that its row names."""

import re
import shlex
from pathlib import Path

import pytest

from train.configuration import apply_overrides, build_model, load_config, validate
from train.main import parse_arguments
from twomamba_jax import VARIANTS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "measurements" / "fineweb.md").read_text()
# What the reader fills in, and what the page sets by them.
VALUES = {"REVISION": "0" * 40, "LLAMA2": "llama"}
SETTINGS = dict(re.findall(r'^(fineweb\w*)="(.*?)"$', PAGE, re.MULTILINE | re.DOTALL))
ROWS = re.findall(r"^\| (.*?) \| ([\d.]+) \| .*? \| `(python .*?)` \|$", PAGE, re.MULTILINE)
# Where the paper's figures that VARIANTS has come from: the size and the context of each.
PAPER = {"medium": ("2mamba", "2mamba-e")}


def expand(text):
    """The text as a shell would have it: names replaced by their values."""
    while "$" in text:
        text = re.sub(r"\$(\w+)", lambda match: (VALUES | SETTINGS)[match[1]], text)
    return text


def configure(command):
    python, flag, module, *arguments = shlex.split(expand(command))
    assert (python, flag, module) == ("python", "-m", "train.main")
    options, overrides = parse_arguments(arguments)
    config = load_config(str(ROOT / options.config))
    apply_overrides(config, overrides)
    return config


@pytest.mark.parametrize(("row", "expected", "command"), ROWS, ids=[f"{row}: {loss}" for row, loss, _ in ROWS])
def test_the_command_has_the_configuration_of_its_row(row, expected, command):
    config = configure(command)
    validate(config)
    model = build_model(config).config
    assert model.layer_mixers == (VARIANTS[config.variant].mixer,) * len(model.layer_mixers)
    assert config.length * config.batch_size == 16_384 * config.microbatches
    assert (config.steps, config.optimizer.decay_steps) == (90_000, 1_000_000)
    home = next((size for size, names in PAPER.items() if config.variant in names), "small")
    if (config.size, config.length) == (home, 2048):
        assert float(expected) == VARIANTS[config.variant].paper_loss


def test_every_figure_of_the_paper_has_its_row():
    """But for those that are of a model of the authors' own, or that the paper has none of."""
    ours = {configure(command).variant for _, _, command in ROWS}
    assert ours == {name for name, variant in VARIANTS.items() if variant.paper_loss is not None} | {"2mamba-e-dt"}

"""README is true: its Python runs as it stands, and continuous integration runs its test command."""

import re
from pathlib import Path

import jax
import pytest
from support.exhaustive import exhaustive

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code):
    """The names that it leaves behind."""
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # the point of the test
    return names


def assert_has_its_shapes(names):
    if "generate" in names:
        assert names["generation"].tokens.shape == (2, 16)
        assert names["cache"].position.shape == (2,)
    else:
        assert names["y"].shape == (2, 100, 4, 32)
        assert names["state"].kv.shape == (2, 4, 528, 32)


CODE = pytest.mark.parametrize("code", PYTHON, ids=["compose", "generate"])


@CODE
def test_code_is_traced(code):
    """As it stands, in shapes, for which nothing is compiled."""
    found = []
    jax.eval_shape(lambda: found.append(run(code)))
    assert_has_its_shapes(*found)


@CODE
@exhaustive("test_code_is_traced; that values are right is for the tests of what it calls")
def test_code_runs(code):
    names = run(code)
    assert_has_its_shapes(names)
    assert "generate" not in names or names["cache"].position.tolist() == [9, 9]


def test_continuous_integration_runs_the_test_command():
    (command,) = re.findall(r"```bash\n(.*pytest)\n```", README)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_the_commands_name_files_and_variants_that_exist():
    from twomamba_jax import parse_pattern

    for config in re.findall(r"--config (configs/\w+\.py)", README):
        assert (ROOT / config).is_file()
    for pattern in re.findall(r'--config\.variant="?([^"\s]+)"?', README):
        assert pattern.startswith("name") or len(parse_pattern(pattern, 4)) == 4

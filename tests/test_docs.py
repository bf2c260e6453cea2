"""The documentation: every public name has its entry, every page is in the navigation, and the examples run."""

import re
from pathlib import Path

import pytest

import twomamba_jax

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: twomamba_jax\.(\w+)$", text, re.MULTILINE))
    documented |= set(re.findall(r"^`(\w+)`\n:   ", text, re.MULTILINE))
    assert documented == set(twomamba_jax.__all__) - {"__version__"} | {"shapes"}


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r"[\w/-]+\.md", navigation)) == PAGES


@pytest.mark.parametrize("page", ["index.md", "variants.md"])
def test_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})  # the point of the test

"""The documentation: every public name has its entry, every page is in the navigation, and the examples run."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
from support.exhaustive import exhaustive

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


def test_files_that_pages_name_by_their_path_exist():
    named = {
        path
        for page in PAGES
        if not page.startswith("measurements/")
        for path in re.findall(
            r"`((?:twomamba_jax|pallas_kernels|train|configs|benchmarks|tests)/[\w/]+\.py)`", (DOCS / page).read_text()
        )
    }
    assert len(named) > 20
    assert [path for path in sorted(named) if not (DOCS.parent / path).is_file()] == []


def test_the_example_of_variants_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "variants.md").read_text(), re.DOTALL)
    exec(compile(block, "variants.md", "exec"), {})  # the point of the test


def test_the_example_of_the_index_is_that_of_readme():
    """Which has its own test."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    lines = set((DOCS.parent / "README.md").read_text().splitlines())
    assert set(block.splitlines()) - lines == {
        "from twomamba_jax import VARIANTS, Mixer",
        '    """A residual block."""',
    }


@exhaustive("the examples of README, of the frameworks and of variants; continuous integration runs this one besides")
def test_the_tutorial_runs(capsys):
    """What it prints is what the text around it says."""
    plt.switch_backend("agg")
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    names = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"tutorial, cell {number}", "exec"), names)
    plt.close("all")
    printed = capsys.readouterr().out
    differences = re.findall(r"^largest difference: (.*)$", printed, re.MULTILINE)
    assert len(differences) == 4
    assert max(map(float, differences)) < 1e-4
    assert "the same bits: True" in printed
    assert names["losses"][-1] < 0.2 < 3 < names["losses"][0]

"""Who imports whom: no arrow up, and no circle."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = "configs", "pallas_kernels", "train", "twomamba_jax"

# From the bottom up; a module imports of its own group and of those before it.
GROUPS = (
    "pallas_kernels",
    "twomamba_jax.shapes",
    "twomamba_jax.ops",
    "twomamba_jax.config",
    "twomamba_jax.variants",
    "twomamba_jax.sampling",
    "twomamba_jax.layers",
    "twomamba_jax.generation",
    "twomamba_jax",
    "configs",
    "train",
)
# Another name of a command of `train`.
SHIMS = {"twomamba_jax.generate"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports_of(name: str, *, when_loaded: bool = False) -> set[str]:
    """The modules of this project that a module imports; `when_loaded`: not those inside of its functions."""
    tree = ast.parse(FILES[name].read_text())
    nodes = tree.body if when_loaded else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules or {node.module}
    return found & FILES.keys()


def group_of(name: str) -> int:
    return max((len(group), at) for at, group in enumerate(GROUPS) if f"{name}.".startswith(f"{group}."))[1]


def test_no_module_imports_what_stands_above_it():
    arrows = {(name, other) for name in FILES for other in imports_of(name) if group_of(other) > group_of(name)}
    assert {name for name, _ in arrows} == SHIMS, arrows


def test_no_modules_import_one_another():
    graph = {name: imports_of(name, when_loaded=True) - {name} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle

"""The examples in docstrings: every public function and class has one, and it prints what it says."""

import doctest
import inspect

import jax
import jax.numpy as jnp
from support.exhaustive import EXHAUSTIVE

import twomamba_jax

DOCUMENTED = {
    name: inspect.getdoc(value)
    for name in twomamba_jax.__all__
    if inspect.isclass(value := getattr(twomamba_jax, name)) or inspect.isfunction(value)
}
# The other examples may use what these two define: `config`; `model`, `tokens`, `params` and `apply`.
SHARED = "ModelConfig", "LanguageModel"
# These compile more: a mixer, a step, a model with a cache, a generation. Continuous integration runs them too.
LONG = {"FiniteState", "Mixer", "decay_attention_step", "init_cache", "roll_back"}
LONG |= {"Decoding", "Generation", "Sampling", "decode", "fork", "generate", "prefill", "seed"}


def run(name: str, names: dict) -> dict:
    """The names after the example of `name`. Fails where it prints something else."""
    example = doctest.DocTestParser().get_doctest(DOCUMENTED[name], names, name, None, None)
    report = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
    assert not failed, "".join(report)
    return example.globs


def test_every_public_docstring_has_an_example():
    assert [name for name, docstring in DOCUMENTED.items() if ">>> " not in docstring] == []


def test_examples_print_what_they_say():
    known = {name: getattr(twomamba_jax, name) for name in twomamba_jax.__all__} | {"jax": jax, "jnp": jnp}
    for name in SHARED:
        known = run(name, known)
    for name in DOCUMENTED:
        if name not in SHARED and (EXHAUSTIVE or name not in LONG):
            run(name, dict(known))

"""The kernels in a program before it is lowered."""

import re

import jax
from jax._src import core  # no other way to the programs inside a program


def kernels(names: str, function, *arguments) -> list[tuple[str, tuple[int, ...]]]:
    """Those whose name matches `names`, in the program's order, each with the shape of its first operand."""

    def within(jaxpr):
        for equation in jaxpr.eqns:
            name = str(equation.params.get("name"))
            if equation.primitive.name != "jit" and re.fullmatch(names, name):
                yield name, equation.invars[0].aval.shape
            for inner in core.jaxprs_in_params(equation.params):
                yield from within(inner)

    return list(within(jax.make_jaxpr(function)(*arguments).jaxpr))

"""What a program is before it is lowered: its kernels, and what its forward pass keeps for the backward pass."""

import contextlib
import io
import re

import jax
import jax.ad_checkpoint
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


def kept(shape: tuple[int, ...], function, *arguments) -> list[str]:
    """Where the arrays of this shape come from that the gradient of `function` needs: `named 'small' from ...`."""
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        jax.ad_checkpoint.print_saved_residuals(function, *arguments)
    of_shape = f"[{','.join(map(str, shape))}] "
    return [line.split(of_shape)[1] for line in lines.getvalue().splitlines() if of_shape in line]

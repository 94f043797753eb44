"""What a compiled function would compute, equation by equation."""

import jax


def equations(jaxpr):
    """All equations, those of loops, branches and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes(function, *arguments):
    """Of all arrays that `function` makes on the way."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return [getattr(variable.aval, "shape", ()) for equation in equations(jaxpr) for variable in equation.outvars]

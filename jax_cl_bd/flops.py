"""Floating point operations of a traced function: two for each multiply-add of its products.

Counted in the jaxpr, so that loops count as often as they run (XLA's own cost analysis counts the
body of a loop once) and what a backward pass computes again counts again. Elementwise work is left
out: peak rates are those of matrix units.
"""

import math

import jax


def count(fn, *args) -> float:
    """FLOPs of matrix products and convolutions in fn(*args), over all devices; args: abstract."""
    return _of(jax.make_jaxpr(fn)(*args).jaxpr)


def _of(jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(
            left[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        window = math.prod(kernel) / kernel[spec[0]]  # per output channel, of its own group
        holes = math.prod(params["lhs_dilation"])  # a transposed convolution multiplies by zeros
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * window / holes
    inside = sum(_of(sub) for value in params.values() for sub in _jaxprs(value))
    if name == "scan":
        return inside * params["length"]
    if name == "shard_map":  # the body is what one device does
        return inside * math.prod(params["mesh"].shape.values())
    if name == "cond":
        return max((_of(b.jaxpr) for b in params["branches"]), default=0.0)
    return inside


def _jaxprs(value):
    for one in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(one, "jaxpr") and hasattr(one, "consts"):
            yield one.jaxpr
        elif hasattr(one, "eqns"):
            yield one

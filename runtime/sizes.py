"""Symbolic dims as the text of Python expressions over named sizes."""

from collections.abc import Callable

import sympy

from fuser.dims import Dim
from fuser.errors import UnsupportedOperator


def expression(dim: Dim, name: Callable[[sympy.Symbol], str]) -> str:
    """`dim` as Python computes it from ints, `name(symbol)` holding each size; in parentheses where it is no atom.

    Raises:
        UnsupportedOperator: the dim has a function that sizes are not computed with.
    """
    if isinstance(dim, int) or dim.is_Integer:
        return str(int(dim)) if dim >= 0 else f"({int(dim)})"
    if dim.is_Symbol:
        return name(dim)
    if isinstance(dim, sympy.floor):
        return _quotient(dim.args[0], name)
    if isinstance(dim, sympy.ceiling):
        return f"(-{_quotient(-dim.args[0], name)})"
    if isinstance(dim, (sympy.Min, sympy.Max)):
        arguments = ", ".join(expression(argument, name) for argument in _ordered(dim))
        return f"{'min' if isinstance(dim, sympy.Min) else 'max'}({arguments})"
    if sympy.fraction(sympy.together(dim))[1] != 1:
        return _quotient(dim, name)  # without a floor, it divides evenly
    if isinstance(dim, sympy.Mod):
        return f"({expression(dim.args[0], name)} % {expression(dim.args[1], name)})"
    if dim.is_Add or dim.is_Mul:
        sign = " + " if dim.is_Add else " * "
        return f"({sign.join(expression(argument, name) for argument in _ordered(dim))})"
    if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
        return f"{expression(dim.base, name)} ** {int(dim.exp)}"
    raise UnsupportedOperator(f"a size is computed by {type(dim).__name__}: {dim}")


def _quotient(dim: sympy.Expr, name: Callable[[sympy.Symbol], str]) -> str:
    """The floor of a quotient."""
    above, below = sympy.fraction(sympy.together(dim))
    over = expression(above, name)
    return over if below == 1 else f"({over} // {expression(below, name)})"


def _ordered(dim: sympy.Expr) -> list[sympy.Expr]:
    return sorted(dim.args, key=sympy.default_sort_key)

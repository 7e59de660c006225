"""The sizes of a program as dims: its symbols, under the names the exporter was given, and expressions over them."""

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from fuser import dims
from fuser.dims import Dim, Shape
from fuser.errors import UnsupportedOperator


class Sizes:
    """Converts sizes of one program; every expression once."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self._known: dict[Any, Dim] = {}

    def of(self, size: Any) -> Dim:
        """An int or SymInt as a dim.

        Raises:
            UnsupportedOperator: an arithmetic that dims do not have.
        """
        if isinstance(size, int):
            return size
        expr = size.node.expr
        found = self._known.get(expr)
        if found is None:
            found = self._known[expr] = self._convert(expr)
        return found

    def shape(self, sizes: Sequence[Any]) -> Shape:
        return tuple(map(self.of, sizes))

    def _convert(self, expr: sympy.Expr) -> Dim:
        if expr.is_Integer:
            return int(expr)
        if isinstance(expr, sympy.Symbol):
            return dims.symbol(self.names.get(expr.name, expr.name))
        parts = [self._convert(part) for part in expr.args]
        if isinstance(expr, FloorDiv):
            return dims.floordiv(*parts)
        if isinstance(expr, (Mod, PythonMod)):
            whole, by = parts
            return dims.sub(whole, dims.mul(by, dims.floordiv(whole, by)))
        if expr.is_Add:
            return _folded(dims.add, parts)
        if expr.is_Mul:
            return _folded(dims.mul, parts)
        if expr.is_Pow and isinstance(parts[1], int) and parts[1] > 0:
            return dims.product([parts[0]] * parts[1])
        name = type(expr).__name__
        if name == "Max":
            return _folded(dims.maximum, parts)
        if name == "Min":
            return _folded(dims.minimum, parts)
        raise UnsupportedOperator(f"the size {expr} is computed by {name}, which is no arithmetic of dims")


def _folded(combine: Any, parts: Iterable[Dim]) -> Dim:
    first, *rest = parts
    for part in rest:
        first = combine(first, part)
    return first


def dim_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Symbol -> the name of the `torch.export.Dim` it stands for, where it has one."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        sizes: tuple[Any, ...] = tuple(value.shape)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                return _names(size.node.shape_env)
    return {}


def _names(environment: Any) -> dict[str, str]:
    """The symbols of an environment of shapes; two may have become one since they were named."""
    found: dict[str, str] = {}
    symbols = getattr(environment, "source_to_var", {})
    for source, name in getattr(environment, "source_name_to_debug_name", {}).items():
        if source in symbols and name.isidentifier():
            expr = environment.replace(symbols[source])
            if isinstance(expr, sympy.Symbol) and name not in found.values():
                found.setdefault(expr.name, name)
    return found

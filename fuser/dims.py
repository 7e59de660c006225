"""Symbolic dims: a tensor's size along one axis as an int or a sympy expression over named symbols.

Symbols stand for non-negative integers (a past of length 0 is ordinary). Arithmetic is cached, because a deep
model asks the same few questions thousands of times.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeAlias

import sympy

Dim: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Dim, ...]


@cache
def symbol(name: str) -> sympy.Symbol:
    """The dim called `name`; equal names are the same dim."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def plain(expr: sympy.Expr | int) -> Dim:
    """`expr` as a Python int where it is one."""
    if isinstance(expr, int):
        return expr
    return int(expr) if expr.is_Integer else expr


@lru_cache(maxsize=65536)
def add(a: Dim, b: Dim) -> Dim:
    return a + b if isinstance(a, int) and isinstance(b, int) else plain(sympy.sympify(a) + b)


@lru_cache(maxsize=65536)
def sub(a: Dim, b: Dim) -> Dim:
    return a - b if isinstance(a, int) and isinstance(b, int) else plain(sympy.sympify(a) - b)


@lru_cache(maxsize=65536)
def mul(a: Dim, b: Dim) -> Dim:
    return a * b if isinstance(a, int) and isinstance(b, int) else plain(sympy.expand(sympy.sympify(a) * b))


@lru_cache(maxsize=65536)
def floordiv(a: Dim, b: Dim) -> Dim:
    """Integer division of non-negative sizes (where truncation and floor agree)."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    return plain(sympy.floor(sympy.expand(sympy.sympify(a) / b)))


@lru_cache(maxsize=65536)
def minimum(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else plain(sympy.Min(a, b))


@lru_cache(maxsize=65536)
def maximum(a: Dim, b: Dim) -> Dim:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else plain(sympy.Max(a, b))


def nonnegative(a: Dim) -> bool:
    """Whether a dim is at least 0 for every value of its symbols."""
    return a >= 0 if isinstance(a, int) else bool(a.is_nonnegative)


@lru_cache(maxsize=65536)
def distance(start: Dim, end: Dim) -> Dim:
    """How many steps from `start` up to `end`: their difference, or 0."""
    difference = sub(end, start)
    return difference if nonnegative(difference) else maximum(0, difference)


@lru_cache(maxsize=65536)
def equal(a: Dim, b: Dim) -> bool | None:
    """Whether two dims are equal for every value of their symbols; None where it depends."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if a == b:
        return True
    difference = sympy.sympify(a) - b
    if difference.is_positive or difference.is_negative or difference.is_zero is False:
        return False
    return True if difference.is_zero else None


def product(dims: Iterable[Dim]) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = mul(total, dim)
    return total


def symbols(dims: Iterable[Dim]) -> set[sympy.Symbol]:
    """The free symbols of some dims."""
    found: set[sympy.Symbol] = set()
    for dim in dims:
        if not isinstance(dim, int):
            found |= dim.free_symbols
    return found


def substitute(dim: Dim, values: Mapping[sympy.Symbol, Dim]) -> Dim:
    """`dim` with some symbols replaced."""
    return dim if isinstance(dim, int) else plain(dim.xreplace({k: sympy.sympify(v) for k, v in values.items()}))


def replace(item: Any, values: Mapping[sympy.Symbol, Dim]) -> Any:
    """`item` with some symbols replaced, and those in what replaces them, where it is a dim or a tuple of dims."""
    if isinstance(item, tuple):
        return tuple(replace(part, values) for part in item)
    for _ in values:  # no chain is longer, and a circle ends
        if not isinstance(item, sympy.Expr) or not item.free_symbols & values.keys():
            break
        item = substitute(item, values)
    return item


def concrete(shape: Sequence[Dim], values: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
    """`shape` as ints, every symbol given a value.

    Raises:
        ValueError: a symbol has no value.
    """
    sizes = []
    for dim in shape:
        size = substitute(dim, values)
        if not isinstance(size, int):
            raise ValueError(f"no value for {', '.join(sorted(map(str, symbols([size]))))}")
        sizes.append(size)
    return tuple(sizes)


def text(shape: Sequence[Dim] | None) -> str:
    """A shape as people write it: `[batch, past + seq, 64]`."""
    return "[?]" if shape is None else "[" + ", ".join(map(str, shape)) + "]"

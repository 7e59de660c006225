"""The numeric check of every rewrite: the replaced region and the fused node, on random inputs, before it is made.

Both sides are evaluated in float64, where they must agree to the precision of the region's own constants, at several
sizes and scales; then in the graph's dtype, where the fused node's error may be at most half as much again as the
region's. Inputs are drawn anew each time, weights included: ones and zeros would hide a wrong axis or a lost
gamma. Sizes that no number in the region depends on shrink, so that a check costs the same at any model's width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import sympy
import torch

from fuser import dims
from fuser.constants import Constant
from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.errors import FuserError
from fuser.evaluation import evaluate
from fuser.fused import FusedOp
from fuser.graph import Node, Value
from fuser.tensors import to_tensor

# (sizes the symbols take, scale of the inputs). Small inputs make an epsilon matter (of 1e-5, of 1e-12), large ones show
# a clamp.
INSTANCES: tuple[tuple[tuple[int, ...], float], ...] = (
    ((2, 5, 3, 7), 1.0),
    ((1, 3, 6, 2), 1e-3),
    ((3, 1, 4, 5), 12.0),
    ((2, 4, 5, 3), 1e-6),
)
BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Where", "And", "Or", "Max", "Min"})
SHRINK_ABOVE = 160
SHRUNK = 24  # what is divided stays at least this large
PRIMES = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73)
# How far constants stored in a dtype (sqrt(2/pi), 0.044715) may be from what they stand for.
PRECISION = {DType.FLOAT64: 1e-9, DType.FLOAT32: 1e-6, DType.FLOAT16: 2e-3, DType.BFLOAT16: 1.6e-2}
NATIVE_RATIO = 1.5


@dataclass
class Rewrite:
    """A region about to become one fused node."""

    region: Sequence[Node]
    outputs: Sequence[Value]
    operator: FusedOp
    inputs: Sequence[Value | Constant | None]
    attributes: dict[str, Any]
    context: Sequence[Node] = ()  # nodes the region reads that stay: evaluated with it

    @property
    def evaluated(self) -> list[Node]:
        """The nodes that both sides' inputs are read from, in order."""
        return [*self.context, *self.region]


@dataclass
class Checker:
    """Checks rewrites, each distinct structure once."""

    opset: int
    checked: int = 0
    reused: int = 0
    error: float = 0.0  # of the fused node checked last, in the graph's dtype, relative to the region in float64
    _verdicts: dict[Any, tuple[str | None, float]] = field(default_factory=dict)

    def check(self, rewrite: Rewrite) -> str | None:
        """None where both sides agree, else what disagreed."""
        key = structure(rewrite)
        if key in self._verdicts:
            self.reused += 1
        else:
            self.checked += 1
            self._verdicts[key] = self._check(rewrite), self.error
        verdict, self.error = self._verdicts[key]
        return verdict

    def _check(self, rewrite: Rewrite) -> str | None:
        shrink = _shrinkable(rewrite)
        verdict = self._compare(rewrite, shrink)
        # A number that depends on a size in a way we did not see (1/D) disagrees only because the size shrank.
        return self._compare(rewrite, {}) if verdict is not None and shrink else verdict

    def _compare(self, rewrite: Rewrite, shrink: dict[int, int]) -> str | None:
        self.error = 0.0
        for number, (sizes, scale) in enumerate(INSTANCES):
            try:
                trial = _Trial(rewrite, shrink, sizes, scale, np.random.default_rng(20260 + number), self.opset)
                reason = trial.run()
                self.error = max(self.error, trial.error)
            except FuserError as error:
                return f"it cannot be checked: {error}"
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                return f"it cannot be checked: {type(error).__name__}: {str(error).splitlines()[0]}"
            if reason is not None:
                return reason
        return None


class _Trial:
    """One instance: sizes for the symbols, one set of inputs."""

    def __init__(
        self,
        rewrite: Rewrite,
        shrink: dict[int, int],
        sizes: Sequence[int],
        scale: float,
        random: np.random.Generator,
        opset: int,
    ) -> None:
        self.rewrite, self.shrink, self.scale, self.random, self.opset = rewrite, shrink, scale, random, opset
        self.leaves: dict[int, np.ndarray] = {}
        self.given: dict[int, np.ndarray] = {}
        self.error = 0.0
        self.drawn = _drawn(rewrite)
        made = {id(value) for node in rewrite.evaluated for value in node.outputs}
        self.outside = list(
            dict.fromkeys(v for node in rewrite.evaluated for v in node.inputs if v is not None and id(v) not in made)
        )
        self.outside += [
            x for x in rewrite.inputs if isinstance(x, Value) and x not in self.outside and id(x) not in made
        ]
        mentioned = [dim for value in self.outside for dim in value.shape or ()]
        mentioned += [dim for node in rewrite.evaluated for value in node.outputs for dim in value.shape or ()]
        equal = _equal_dims(rewrite)
        names = sorted(dims.symbols(mentioned) - equal.keys(), key=str)
        self.symbols: dict[sympy.Symbol, int] = {name: sizes[i % len(sizes)] for i, name in enumerate(names)}
        for name, dim in equal.items():
            size = dims.substitute(dim, self.symbols)
            self.symbols[name] = size if isinstance(size, int) else sizes[0]
        self.precision = max((PRECISION.get(dtype, 0.0) for dtype in self._floats()), default=1e-6)

    def _floats(self) -> list[DType]:
        values = [*self.outside, *(v for node in self.rewrite.evaluated for v in node.outputs)]
        return [value.dtype for value in values if value.dtype is not None and value.dtype.is_float]

    def run(self) -> str | None:
        truth = self._region(torch.float64)
        exact = self._fused(torch.float64)
        native, fused = self._region(None), self._fused(None)
        for i, value in enumerate(self.rewrite.outputs):
            if exact[i].shape != truth[i].shape:
                return f"output {i} has shape {list(exact[i].shape)} where the region gives {list(truth[i].shape)}"
            if fused[i].dtype != native[i].dtype:
                return f"output {i} is {fused[i].dtype} where the region gives {native[i].dtype}"
            if value.dtype is None or not value.dtype.is_float:
                if not torch.equal(exact[i], truth[i]):
                    return f"output {i} differs"
                continue
            error = relative_error(exact[i], truth[i])
            if not error <= self.precision:
                return f"output {i} differs by {error:.1e} of its norm in float64 (sizes {self._sizes()})"
            allowed = max(
                NATIVE_RATIO * relative_error(native[i], truth[i]), 4 * torch.finfo(native[i].dtype).eps, self.precision
            )
            rounding = relative_error(fused[i], truth[i])
            self.error = max(self.error, rounding)
            if not rounding <= allowed:
                return f"output {i} is less precise than the region in {value.dtype}"
        return None

    def _sizes(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.symbols.items()) or "as declared"

    def _tensor(self, given: Value | Constant, dtype: torch.dtype | None) -> torch.Tensor:
        constant = given.constant if isinstance(given, Value) else given
        if constant is not None:
            array = constant.rebuild(self._leaf)
        else:
            assert isinstance(given, Value)
            if id(given) not in self.given:
                shape = dims.concrete(self._shrunk(given.shape or ()), self.symbols)
                if any(size < 0 for size in shape):
                    raise FuserError(f"{given.name} would have shape {list(shape)}")
                self.given[id(given)] = self._draw(shape, given.dtype, self.scale)
            array = self.given[id(given)]
        tensor = to_tensor(array)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def _leaf(self, constant: Constant) -> np.ndarray:
        if id(constant) not in self.drawn and constant.is_known:
            array = constant.numpy()
            # What the fused node alone reads (zeros where one of several biases is absent) shrinks with the rest.
            return np.full(self._shrunk(constant.shape), array.flat[0]) if _is_uniform(array) else array
        if id(constant) not in self.leaves:
            shape = tuple(int(size) for size in self._shrunk(constant.shape))
            scale = 1.0 / math.sqrt(shape[0]) if len(shape) == 2 else 1.0
            self.leaves[id(constant)] = self._draw(shape, constant.dtype, scale)
        return self.leaves[id(constant)]

    def _shrunk(self, shape: Sequence[dims.Dim]) -> tuple[dims.Dim, ...]:
        return tuple(self.shrink.get(dim, dim) if isinstance(dim, int) else dim for dim in shape)

    def _draw(self, shape: tuple[int, ...], dtype: DType | None, scale: float) -> np.ndarray:
        if dtype is None:
            raise FuserError("an input's type is not known")
        if dtype.is_float:
            array = self.random.standard_normal(shape, np.float32) * np.float32(scale)
            return array.astype(ml_dtypes.bfloat16 if dtype is DType.BFLOAT16 else dtype.numpy)
        array = self.random.integers(0, 2, shape).astype(dtype.numpy)
        if dtype is DType.BOOL and array.ndim:
            array[(0,) * (array.ndim - 1)] = False  # a row of a mask that allows nothing is a case of its own
        return array

    def _values(self, nodes: Sequence[Node], dtype: torch.dtype | None) -> dict[int, torch.Tensor | None]:
        """The drawn inputs and what some nodes make of them."""
        values: dict[int, torch.Tensor | None] = {id(v): self._tensor(v, dtype) for v in self.outside}
        for node in nodes:
            inputs = [None if v is None else values[id(v)] for v in node.inputs]
            small = replace(node, attributes=_replaced(node.attributes, self.shrink))
            results = evaluate(small, inputs, self.symbols, opset=self.opset, float_dtype=dtype)
            values.update((id(v), result) for v, result in zip(node.outputs, results, strict=False))
        return values

    def _region(self, dtype: torch.dtype | None) -> list[torch.Tensor]:
        values = self._values(self.rewrite.evaluated, dtype)
        return [_present(values[id(value)]) for value in self.rewrite.outputs]

    def _fused(self, dtype: torch.dtype | None) -> list[torch.Tensor]:
        made = self._values(self.rewrite.context, dtype)
        inputs = [
            None if x is None else made[id(x)] if id(x) in made else self._tensor(x, dtype) for x in self.rewrite.inputs
        ]
        attributes = _replaced(self.rewrite.attributes, self.shrink)
        attributes = {k: list(v) if isinstance(v, tuple) else v for k, v in attributes.items()}
        return self.rewrite.operator.evaluate(inputs, attributes)


def _equal_dims(rewrite: Rewrite) -> dict[sympy.Symbol, Dim]:
    """Sizes of inputs that must be others' (a mask's length that of the keys) for the region to be computed at all."""
    pairs: list[tuple[Dim, Dim]] = []
    for node in rewrite.evaluated:
        shapes = [value.shape for value in node.inputs if value is not None and value.shape is not None]
        if node.op in BROADCASTING and not node.domain:
            pairs += [pair for a in shapes for b in shapes for pair in zip(a[::-1], b[::-1], strict=False)]
        elif node.is_a("Expand"):
            pairs += zip(shapes[0][::-1], node.attributes.get("shape", ())[::-1], strict=False)
        elif node.is_a("Attention") and len(shapes) > 3 and len(shapes[1]) == 4:
            pairs += [(shapes[3][-1], shapes[1][2]), (shapes[3][-2], shapes[0][2])]
    made = dims.symbols(dim for node in rewrite.evaluated for value in node.outputs for dim in value.shape or ())
    made -= dims.symbols(dim for v in rewrite.inputs if isinstance(v, Value) for dim in v.shape or ())
    found: dict[sympy.Symbol, Dim] = {}
    for a, b in pairs:
        a, b = (dims.replace(dim, found) for dim in (a, b))
        if isinstance(a, sympy.Symbol) and a not in dims.symbols([b]) | made and not isinstance(b, int):
            found[a] = b
    return found


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise FuserError("an output of the region is absent")
    return tensor


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """||actual - reference|| / ||reference|| in float64; infinite where either is not finite alone."""
    a, r = actual.double(), reference.double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(r)):
        return math.inf
    a, r = torch.nan_to_num(a, posinf=0, neginf=0), torch.nan_to_num(r, posinf=0, neginf=0)
    norm = float(torch.linalg.vector_norm(r))
    difference = float(torch.linalg.vector_norm(a - r))
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)


def _drawn(rewrite: Rewrite) -> set[int]:
    """The stored constants that both sides read as tensors: weights, whose elements the check draws anew."""
    fused = [x.constant if isinstance(x, Value) else x for x in rewrite.inputs]
    region = [v.constant for node in rewrite.evaluated for v in node.inputs if v is not None]
    read = {id(leaf) for constant in region if constant is not None for leaf in constant.leaves()}
    return read & {id(leaf) for constant in fused if constant is not None for leaf in constant.leaves()}


def _is_uniform(array: np.ndarray) -> bool:
    return array.size > 0 and bool((array == array.flat[0]).all())


def _shrinkable(rewrite: Rewrite) -> dict[int, int]:
    """The large sizes of a rewrite, each with a small one to take its place.

    Sizes that no attribute mentions become primes. Where some are mentioned (the parts of a Split), all are divided by
    one number, so that what adds up still does.
    """
    mentioned = {
        number
        for attributes in (*(node.attributes for node in rewrite.evaluated), rewrite.attributes)
        for attribute in attributes.values()
        for number in (attribute if isinstance(attribute, tuple) else (attribute,))
        if isinstance(number, int)
    }
    inputs = {id(x) for x in rewrite.inputs if isinstance(x, Value)}
    drawn = _drawn(rewrite)
    sizes: set[int] = set()
    real: set[int] = set()
    for node in rewrite.evaluated:
        for value in (*node.inputs, *node.outputs):
            if value is None or value.shape is None:
                continue
            fixed = {dim for dim in value.shape if isinstance(dim, int)}
            sizes |= fixed
            if (
                value.constant is not None
                and id(value) not in inputs
                and not all(id(leaf) in drawn for leaf in value.constant.leaves())
            ):
                real |= fixed  # its elements are real, so its size is
    large = sorted(size for size in sizes if size > SHRINK_ABOVE)
    if mentioned & set(large) and not real & set(large):
        numbers = {*large, *(number for number in mentioned if SHRINK_ABOVE < number <= large[-1])}
        common = math.gcd(*numbers)
        by = max(d for d in range(1, common + 1) if common % d == 0 and (d == 1 or large[0] // d >= SHRUNK))
        return {number: number // by for number in numbers} if by > 1 else {}
    return dict(zip((size for size in large if size not in mentioned | real), PRIMES, strict=False))


def _replaced(attributes: Mapping[str, Any], shrink: Mapping[int, int]) -> dict[str, Any]:
    """Attributes with the sizes they mention replaced."""

    def of(item: Any) -> Any:
        if isinstance(item, tuple):
            return tuple(map(of, item))
        return shrink.get(item, item) if isinstance(item, int) else item

    return {name: of(attribute) for name, attribute in attributes.items()}


def structure(rewrite: Rewrite) -> Any:
    """What a check depends on: operators, wiring, attributes, shapes, dtypes and the values of interior constants."""
    numbers: dict[int, int] = {}
    drawn = _drawn(rewrite)

    def form(constant: Constant) -> Any:
        if constant.inner:
            return (type(constant).__name__, *map(form, constant.inner))
        drawn_as = numbers.setdefault(id(constant), len(numbers)) if id(constant) in drawn else None
        elements = (
            drawn_as if drawn_as is not None else constant.numpy().tobytes() if constant.is_known else id(constant)
        )
        return (constant.dtype, constant.shape, elements)

    def of(value: Value | Constant | None) -> Any:
        if value is None:
            return None
        constant = value.constant if isinstance(value, Value) else value
        if constant is not None:
            return form(constant)
        assert isinstance(value, Value)
        return (numbers.setdefault(id(value), len(numbers)), value.dtype, value.shape)

    nodes = tuple(
        (node.op, node.domain, _frozen(node.attributes), tuple(map(of, node.inputs)), tuple(map(of, node.outputs)))
        for node in rewrite.evaluated
    )
    interface = (tuple(map(of, rewrite.inputs)), tuple(map(of, rewrite.outputs)))
    return (rewrite.operator.name, nodes, interface, _frozen(rewrite.attributes))


def _frozen(attributes: dict[str, Any]) -> Any:
    freeze: Callable[[Any], Any] = lambda v: v.numpy().tobytes() if isinstance(v, Constant) else v  # noqa: E731
    return tuple((name, freeze(value)) for name, value in sorted(attributes.items()))

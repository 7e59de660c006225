"""The end-to-end check: the original and the fused model in ONNX Runtime, on inputs as generation would feed them.

What each input is for is read from the graph: token ids index a table of constants, positions reach a sine or index a
table of them, states are floating-point and come back longer. From that follow decode, prefill, chunk and left-padded
batches.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from fuser.checking import relative_error
from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.errors import VerificationError
from fuser.exporter import Artifact
from fuser.graph import Graph, Node, Value
from fuser.tensors import to_tensor

WEIGHT_LIMIT_BYTES = 512 << 20  # above this, running two copies is more than a check may cost
TOLERANCE = {DType.FLOAT64: 2e-5, DType.FLOAT32: 2e-5, DType.FLOAT16: 1e-2, DType.BFLOAT16: 5e-2}
NOISE_FACTOR = 4.0  # of what ONNX Runtime's own optimizations change in the original


@dataclass(frozen=True)
class Role:
    """What an input is for, as its readers show it: `tokens`, `positions`, `mask`, `state` or `data`."""

    name: str
    kind: str
    dtype: DType
    shape: tuple[Dim, ...]
    bound: int = 2  # integers are drawn below this


@dataclass
class Verification:
    """Outcome of the end-to-end check: the largest relative error of each case, or why there is none."""

    cases: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    skipped: str = ""

    @property
    def max_relative_error(self) -> float | None:
        return max(self.cases.values(), default=None)

    @property
    def passed(self) -> bool:
        return all(error <= self.tolerance for error in self.cases.values())

    def to_json(self) -> dict[str, Any]:
        status = "skipped" if self.skipped else "passed" if self.passed else "failed"
        errors = {name: error if math.isfinite(error) else None for name, error in self.cases.items()}
        worst = self.max_relative_error
        return {
            "status": status,
            "reason": self.skipped or None,
            "max_relative_error": worst if worst is not None and math.isfinite(worst) else None,
            "tolerance": self.tolerance,
            "cases": errors,
        }


_PLAIN = frozenset(
    {
        "Cast",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Identity",
        "Clip",
        "Add",
        "Sub",
        "Mul",
        "Where",
        "Expand",
        "Slice",
        "Max",
        "Min",
        "Concat",
        "Transpose",
        "Flatten",
    }
)
_ROTARY = frozenset({"Sin", "Cos", "RotaryEmbedding"})


def roles(graph: Graph) -> list[Role]:
    """The role of each input of a canonical graph.

    Raises:
        VerificationError: an input has a type or shape that inputs cannot be made for.
    """
    found = []
    for value in graph.inputs:
        if value.dtype is None or value.shape is None or value.dtype in (DType.STRING, DType.OTHER):
            raise VerificationError(f"input '{value.name}' has no tensor type and shape to draw inputs for")
        found.append(_role(value, value.dtype, value.shape))
    return found


def _role(value: Value, dtype: DType, shape: tuple[Dim, ...]) -> Role:
    rank = len(shape)
    if dtype.is_float:
        kind = "state" if _is_state(value) else "mask" if rank == 2 or (rank == 4 and shape[1] == 1) else "data"
        return Role(value.name, kind, dtype, shape)
    bound = _table_size(value)
    if bound is not None:
        return Role(value.name, "tokens", dtype, shape, bound)
    if dtype.is_integer and rank <= 2 and _reaches_rotation(value):
        return Role(value.name, "positions", dtype, shape)
    return Role(value.name, "mask" if rank in (2, 4) else "data", dtype, shape)


def _is_state(value: Value) -> bool:
    """Whether new keys or values are appended to it, by Concat or inside an attention operator."""
    moves = frozenset({"Transpose", "Reshape", "Cast", "Unsqueeze", "Squeeze", "Identity", "Gather", "Slice", "Split"})
    appends = frozenset(
        {"Concat", "Attention", "GroupQueryAttention", "MultiHeadAttention", "ScatterND", "ScatterElements"}
    )
    return len(value.shape or ()) > 2 and any(node.op in appends for node, _ in _forward(value, moves))


def _table_size(start: Value) -> int | None:
    """Rows of the constant table that `start` indexes, through at most a few shape operators and offsets."""
    for node, value in _forward(start, frozenset({"Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"})):
        if node.is_a("Gather") and node.input(1) is value:
            table = node.inputs[0]
            if (
                table is not None
                and table.constant is not None
                and table.shape
                and isinstance(table.shape[0], int)
                and len(table.shape) == 2
            ):
                return table.shape[0]
    return None


def _reaches_rotation(start: Value) -> bool:
    """Whether a sine is taken of it, or it chooses rows of a computed table of floats: of sines, expanded or cut to length.

    Positions are not summed: a mask is whose running sum gives them, even where it is multiplied with that sum again.
    """
    reached = list(_forward(start, _PLAIN | {"MatMul", "Gather", "Tile"}))
    return any(node.op in _ROTARY or _is_index(node, value) for node, value in reached) and not any(
        node.op == "CumSum" for node, _ in reached
    )


def _is_index(node: Node, value: Value) -> bool:
    table = node.input(0)
    return (
        node.op in ("Gather", "GatherElements")
        and node.input(1) is value
        and table is not None
        and table is not value
        and table.dtype is not None
        and table.dtype.is_float
    )


def _forward(start: Value, through: frozenset[str]) -> Iterable[tuple[Node, Value]]:
    seen: set[Node] = set()
    pending = [(node, start) for node in start.consumers]
    while pending:
        node, value = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node, value
        if node.op in through:
            pending.extend((user, output) for output in node.outputs for user in output.consumers)


@dataclass(frozen=True)
class Case:
    """Sizes of one kind of step."""

    name: str
    batch: int
    new: int
    past: int
    padding: int = 0


CASES = (Case("decode", 1, 1, 5), Case("prefill", 1, 7, 0), Case("chunk", 1, 3, 5), Case("padded", 2, 3, 5, padding=2))
ONE_TOKEN = Case("padded", 2, 1, 5, padding=2)  # the padded batch of a graph that takes no more
STATELESS = (Case("short", 1, 1, 0), Case("full", 1, 7, 0), Case("padded", 2, 6, 0, padding=2))


def cases(found: list[Role]) -> list[Case]:
    """The cases a model's fixed dims allow."""
    has_state = any(role.kind == "state" for role in found)
    allowed: list[Case] = []
    for case in (*CASES, ONE_TOKEN) if has_state else STATELESS:
        if any(case.name == other.name for other in allowed):
            continue
        if case.padding and not any(role.kind == "mask" for role in found):
            continue
        wanted = sizes(found, case)
        if all(not isinstance(d, int) or d == n for r in found for d, n in zip(r.shape, wanted[r.name], strict=True)):
            allowed.append(case)
    if not allowed:
        # Fixed dims leave one kind of step: the one they describe.
        batch, new = next(((r.shape[0], r.shape[1]) for r in found if r.kind == "tokens" and len(r.shape) == 2), (1, 1))
        past = next((dim for r in found if r.kind == "state" for dim in r.shape[2:-1] if isinstance(dim, int)), 5)
        allowed.append(Case("fixed", batch if isinstance(batch, int) else 1, new if isinstance(new, int) else 1, past))
    return allowed


def sizes(found: list[Role], case: Case) -> dict[str, list[int]]:
    """The shape of every input in a case: by their place where the role says what a place is, else by the dims' names."""
    has_state = any(role.kind == "state" for role in found)
    total = case.past + case.new
    named: dict[Dim, int] = {}
    wanted: dict[str, list[int]] = {}
    order = ("tokens", "positions", "state", "data", "mask")
    for role in sorted(found, key=lambda r: order.index(r.kind)):
        rank = len(role.shape)
        if role.kind in ("tokens", "positions"):
            places = [case.new] if rank == 1 else [case.batch] * (rank - 1) + [case.new]
        elif role.kind == "state":
            places = [dim if isinstance(dim, int) else case.past for dim in role.shape]
            places[0] = case.batch
        elif role.kind == "mask":
            last = role.shape[-1] if rank else 0
            length = named.get(last, total) if not (has_state and last in named and named[last] == case.new) else total
            places = [case.batch, 1, case.new, length][-4:] if rank == 4 else [case.batch] * (rank - 1) + [length]
        else:
            places = [
                dim if isinstance(dim, int) else named.get(dim, case.new if axis else case.batch)
                for axis, dim in enumerate(role.shape)
            ]
        for dim, size in zip(role.shape, places, strict=True):
            if not isinstance(dim, int):
                named.setdefault(dim, size)
        wanted[role.name] = places
    return wanted


def feeds(found: list[Role], case: Case) -> dict[str, np.ndarray]:
    """Inputs of one case: random tokens and states, the mask padded on the left, positions counting real tokens."""
    random = np.random.default_rng(len(case.name) * 1000 + case.new)
    total = case.past + case.new
    attended = np.ones((case.batch, total), np.int64)
    attended[1:, : case.padding] = 0
    positions = np.maximum(attended.cumsum(-1) - 1, 0)[:, case.past :]
    made: dict[str, np.ndarray] = {}
    wanted = sizes(found, case)
    for role in found:
        shape, kind = wanted[role.name], role.dtype.numpy
        if role.kind == "tokens":
            made[role.name] = random.integers(0, role.bound, shape).astype(kind)
        elif role.kind == "positions":
            made[role.name] = np.broadcast_to(positions if len(shape) == 2 else positions[0], shape).astype(kind)
        elif role.kind == "mask" and len(shape) == 2 and shape[1] == total:
            made[role.name] = attended.astype(kind)
        elif role.kind == "mask" and len(shape) == 2:
            made[role.name] = np.ones(shape, kind)
        elif role.kind == "mask" and len(shape) == 4 and shape[-1] == total:
            causal = np.arange(total) <= np.arange(case.past, total)[:, None]
            made[role.name] = np.broadcast_to(causal & (attended[:, None, None, :] > 0), shape).astype(kind)
        elif role.dtype.is_float:
            made[role.name] = (random.standard_normal(shape) * 0.5).astype(kind)
        else:
            made[role.name] = random.integers(0, role.bound, shape).astype(kind)
    return made


def session(model: str | bytes, *, optimize: bool) -> Any:
    """An ONNX Runtime session on the CPU, silent."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Where it reads a weight from DequantizeLinear, it would else round the inputs of a product to eight bits as well.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _plainest(model: str | bytes) -> Any:
    """A session as near to the model as written as ONNX Runtime has (old versions fail on some without optimizations)."""
    try:
        return session(model, optimize=False)
    except Exception:
        return session(model, optimize=True)


Outputs: TypeAlias = dict[str, Any]
Run: TypeAlias = Callable[[Mapping[str, np.ndarray]], Outputs]


@dataclass(frozen=True)
class Reference:
    """What results are held against.

    Attributes:
        run: the outputs for some inputs.
        again: the same, computed in another way: what they differ by is what rounding alone may change.
        factor: of that difference, what is tolerated.
    """

    run: Run
    again: Run
    factor: float = NOISE_FACTOR


def reference_of(original: str | bytes) -> Reference:
    """A source model, by its path or its bytes, in ONNX Runtime without its optimizations."""
    return Reference(partial(_run, _plainest(original)), lambda given: _run(session(original, optimize=True), given))


def compare(original: str | bytes | Reference, artifact: Artifact, found: list[Role], dtype: DType) -> Verification:
    """Runs the original, without ONNX Runtime's optimizations, and the fused model, with them, on every case.

    Args:
        original: the source model's path, its bytes, or what stands for it.
        artifact: the fused model.
        found: the inputs' roles.
        dtype: the coarsest floating type of the model, which sets the tolerance.
    """
    outcome = Verification(tolerance=TOLERANCE.get(dtype, 2e-5))
    try:
        reference = original if isinstance(original, Reference) else reference_of(original)
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        outcome.skipped = f"ONNX Runtime does not run the original: {_first_line(error)}"
        return outcome
    with tempfile.TemporaryDirectory(prefix="fuser-") as folder:
        model: str | bytes = artifact.model.SerializeToString(deterministic=True)
        if artifact.external:
            model = str(Path(folder) / "fused.onnx")
            artifact.write(model)
        try:
            fused = session(model, optimize=True)
        except Exception as error:
            raise VerificationError(f"ONNX Runtime does not load the fused model: {_first_line(error)}") from None
        refusal = ""
        for case in cases(found):
            inputs = feeds(found, case)
            try:
                expected = reference.run(inputs)
            except Exception as error:
                refusal = f"the inputs drawn for the original are refused: {_first_line(error)}"
                continue
            try:
                actual = _run(fused, inputs)
            except Exception as error:
                raise VerificationError(f"the fused model fails on {case.name}: {_first_line(error)}") from None
            if not _has_numbers(expected):
                refusal = f"the original gives no finite number on {case.name}"
                continue
            outcome.cases[case.name] = difference = worst(actual, expected)
            if difference > outcome.tolerance:
                if worst(reference.run(inputs), expected) > outcome.tolerance:
                    return Verification(skipped="the original's own results differ from run to run")
                # Perhaps the model amplifies any rounding: what does another way to compute the same change?
                noise = worst(reference.again(inputs), expected)
                outcome.tolerance = max(outcome.tolerance, reference.factor * noise if math.isfinite(noise) else 0.0)
    if not outcome.cases:
        outcome.skipped = refusal or "no inputs could be drawn"
    return outcome


def _run(runner: Any, inputs: Mapping[str, np.ndarray]) -> Outputs:
    names = [output.name for output in runner.get_outputs()]
    return dict(zip(names, runner.run(names, dict(inputs)), strict=True))


def _has_numbers(outputs: Mapping[str, Any]) -> bool:
    """Whether every floating-point tensor with elements has finite ones: of NaN alone nothing can be said."""
    arrays = [
        array for output in outputs.values() for array in _arrays(output) if array.dtype.kind in "fV" and array.size
    ]
    return all(bool(torch.isfinite(to_tensor(array)).any()) for array in arrays)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def worst(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest relative error (norm-wise) over a model's outputs."""
    errors = [0.0]
    for name in expected:
        found, references = list(_arrays(actual[name])), list(_arrays(expected[name]))
        if [array.shape for array in found] != [array.shape for array in references]:
            return math.inf
        for array, reference in zip(found, references, strict=True):
            if reference.dtype.kind in "fV":
                errors.append(relative_error(to_tensor(array), to_tensor(reference)))
            else:
                errors.append(float(np.mean(array != reference)) if reference.size else 0.0)
    return max(errors)


def _arrays(output: Any) -> Iterator[np.ndarray]:
    """The tensors of an output: itself, or the elements of a sequence; anything else as an object."""
    if isinstance(output, list):
        for element in output:
            yield from _arrays(element)
    elif isinstance(output, np.ndarray):
        yield output
    else:
        yield np.array([output], object)


def too_large(weights_bytes: int) -> str:
    """Why a model of that many bytes is not compared whole; nothing where it is."""
    if weights_bytes <= WEIGHT_LIMIT_BYTES:
        return ""
    return f"its weights exceed {WEIGHT_LIMIT_BYTES >> 20} MiB; every rewrite was proven by itself"


def coarsest(graph: Graph) -> DType:
    """The floating type with the fewest bits that the model computes in."""
    floats = {
        value.dtype
        for node in graph.nodes
        for value in node.outputs
        if value.dtype is not None and value.dtype.is_float
    }
    order = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)
    return next((dtype for dtype in order if dtype in floats), DType.FLOAT32)

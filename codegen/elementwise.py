"""Row-wise kernels of any chain of element-wise operators and norms, composed from what each operator says of itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuser.codegen.kernel import ACTIVATIONS, LONGEST_ROW, Emitter, Kernel, element, power_of_two
from fuser.errors import UsageError

# What an operator is, in float32, of operands that are named in order.
EXPRESSIONS: Mapping[str, str] = {
    "Add": "{} + {}",
    "Sub": "{} - {}",
    "Mul": "{} * {}",
    "Div": "{} / {}",
    "Neg": "-{}",
    "Abs": "tl.abs({})",
    "Sqrt": "tl.sqrt({})",
    "Rsqrt": "tl.rsqrt({})",
    "Reciprocal": "1.0 / {}",
    "Exp": "tl.exp({})",
    "Log": "tl.log({})",
    "Sigmoid": "1.0 / (1.0 + tl.exp(-{}))",
    "Tanh": "tanh({})",
    "Erf": "tl.erf({})",
    "Relu": "higher({}, 0.0)",
    "Max": "higher({}, {})",
    "Min": "lower({}, {})",
    "Clip": "lower(higher({}, {}), {})",
    "Cast": "{}",
    "Identity": "{}",
    **{name: f"{name}({{}})" for name in ACTIVATIONS},
}
FUNCTIONS = {
    "tanh(": '''
@triton.jit
def tanh(x):
    """The hyperbolic tangent, by its series where 1 - 2 / (exp(2 x) + 1) would cancel."""
    s = x * x
    small = x * (1.0 - s * (0.3333333333333333 - s * (0.13333333333333333 - s * 0.05396825396825397)))
    return tl.where(tl.abs(x) < 0.2, small, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
''',
    "higher(": '''
@triton.jit
def higher(x, y):
    """The larger of two; NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
''',
    "lower(": '''
@triton.jit
def lower(x, y):
    """The smaller of two; NaN if either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
''',
}
NORMS = ("rms_norm", "layer_norm")
TILE = 1024  # columns of a program, of rows that need not be held whole


@dataclass(frozen=True)
class Column:
    """An input that is the same for every token: a vector [D]."""


@dataclass(frozen=True)
class Row:
    """An input with a row for each token, perhaps a part of a wider one."""


Input = Row | Column
Operand = tuple[str, int] | float  # ("input", i), ("step", j), or a number


@dataclass(frozen=True)
class Computed:
    """One operator: of EXPRESSIONS, `gated` with an activation's name, or a norm with `eps`, its scale, and its shift."""

    op: str
    operands: tuple[Operand, ...]
    eps: float = 0.0
    activation: str = ""


@dataclass(frozen=True)
class Elementwise:
    """What a row-wise kernel computes: `steps` one after another, of which `outputs` are stored.

    Rows are of `groups` times `D` elements; norms are over D, and vectors of D elements.
    """

    D: int
    inputs: tuple[Input, ...]
    steps: tuple[Computed, ...]
    outputs: tuple[int, ...]
    groups: int = 1
    dtype: str = "bf16"


def norm(
    kind: str, D: int, *, eps: float, dtype: str = "bf16", skip: bool = False, weight: bool = True, bias: bool = False
) -> Elementwise:
    """rms_norm or layer_norm (`kind` "rms" or "layer") of x, with `skip` of x + skip: x, [skip,] [weight,] [bias,] y[, sum]."""
    steps = [Computed("Add", (("input", 0), ("input", 1)))] * skip
    vectors = [("input", 1 + skip + i) for i in range(weight + bias)]
    steps.append(Computed(f"{kind}_norm", (("step", 0) if skip else ("input", 0), *vectors), eps))
    inputs: tuple[Input, ...] = (*[Row()] * (1 + skip), *[Column()] * len(vectors))
    return Elementwise(D, inputs, tuple(steps), (1, 0) if skip else (0,), dtype=dtype)


def gate(F: int, *, activation: str, dtype: str = "bf16") -> Elementwise:
    """activation(gate) * up: gate, up, y."""
    step = Computed("gated", (("input", 0), ("input", 1)), activation=activation)
    return Elementwise(F, (Row(), Row()), (step,), (0,), dtype=dtype)


def elementwise(what: Elementwise, *, num_warps: int | None = None) -> Kernel:
    """The kernel of `what`: launch(*inputs, *outputs): rows [tokens, groups D] of any stride, vectors [D], outputs contiguous.

    Raises:
        UsageError: an operator that the family does not have, a row too long for a norm, another dtype.
    """
    is_whole = any(step.op in NORMS for step in what.steps)
    if any(step.activation and step.activation not in ACTIVATIONS for step in what.steps):
        raise UsageError(f"codegen: an activation is {', '.join(ACTIVATIONS)}")
    if is_whole and what.D > LONGEST_ROW:
        raise UsageError(f"codegen: a row of a norm has at most {LONGEST_ROW} elements, not {what.D}")
    BLOCK = power_of_two(what.D) if is_whole else min(TILE, power_of_two(what.D))
    blocks = -(-what.D // BLOCK)
    names = [step.activation or step.op for step in what.steps]
    grid = "(rows,)" if blocks == 1 else f"(rows, {blocks} blocks of columns)"
    of_rows = f"rows of {what.D}" if what.groups == 1 else f"{what.groups} groups of {what.D} in every row"
    e = Emitter(
        "rows",
        f"{', '.join(names)} over {of_rows}.",
        (
            f"Grid: {grid}. One program computes {BLOCK} columns of one {'row' if what.groups == 1 else 'group'}.",
            "In float32, rounded where a value is stored; what follows takes it as stored.",
        ),
        {"num_warps": num_warps or min(max(BLOCK // 512, 1), 16), "num_stages": 1},
    )
    inputs = [f"x{i}" for i in range(len(what.inputs))]
    outputs = [f"y{i}" for i in range(len(what.outputs))]
    for name in (*inputs, *outputs):
        e.pointer(name, element(what.dtype))
    strided = [name for name, kind in zip(inputs, what.inputs, strict=True) if isinstance(kind, Row)]
    for name in strided:
        e.integer(f"{name}_stride")
    e.constant(D=what.D, BLOCK=BLOCK)
    if what.groups > 1:
        e.constant(GROUPS=what.groups)
    for name in dict.fromkeys(names):
        if name in ACTIVATIONS:
            e.part(ACTIVATIONS[name].replace("def activation(", f"def {name}("))
    for name, text in FUNCTIONS.items():
        if any(name in EXPRESSIONS.get(step.op, "") for step in what.steps):
            e.part(text)
    e.begin(waits=True)
    _places(e, what, blocks)
    _loads(e, what, BLOCK)
    _steps(e, what, BLOCK)
    parameters = [*inputs, *outputs]
    arguments = [*parameters, *(f"{name}.stride(0)" for name in strided)]
    rows = f"{outputs[0]}.shape[0]" + (f" * {what.groups!r}" if what.groups > 1 else "")
    e.host += [
        f"def launch({', '.join(parameters)}, pdl=False):",
        f'    """Fills {", ".join(outputs)}; other rows may be strided."""',
        f"    rows = {rows}",
        "    if rows:",
        f"        {e.launched('(rows,)' if blocks == 1 else f'(rows, {blocks!r})', *arguments)}",
    ]
    return e.kernel()


def _places(e: Emitter, what: Elementwise, blocks: int) -> None:
    if what.groups > 1:
        e.add("row = (tl.program_id(0) // GROUPS).to(tl.int64)", "start = tl.program_id(0) % GROUPS * D")
    else:
        e.add("row = tl.program_id(0).to(tl.int64)")
    block = "tl.program_id(1) * BLOCK + " if blocks > 1 else ""
    e.add(f"columns = {block}tl.arange(0, BLOCK)")


def _mask(what: Elementwise, BLOCK: int, other: bool = False) -> str:
    return "" if what.D % BLOCK == 0 else ", mask=columns < D" + (", other=0.0" if other else "")


def _loads(e: Emitter, what: Elementwise, BLOCK: int) -> None:
    within = "start + columns" if what.groups > 1 else "columns"
    for i, kind in enumerate(what.inputs):
        place = f"row * x{i}_stride + {within}" if isinstance(kind, Row) else "columns"
        e.add(f"a{i} = tl.load(x{i} + {place}{_mask(what, BLOCK, other=True)}).to(tl.float32)")


def _steps(e: Emitter, what: Elementwise, BLOCK: int) -> None:
    stored = {step: i for i, step in enumerate(what.outputs)}
    width = "GROUPS * D" if what.groups > 1 else "D"
    within = "start + columns" if what.groups > 1 else "columns"
    for j, step in enumerate(what.steps):
        operands = [_name(operand) for operand in step.operands]
        if step.op in NORMS:
            _norm(e, f"s{j}", step, operands, masked=what.D % BLOCK != 0)
        elif step.op == "gated":
            e.add(f"s{j} = {step.activation}({operands[0]}) * {operands[1]}")
        else:
            e.add(f"s{j} = {_expression(step, operands)}")
        if j in stored:
            y = f"y{stored[j]}"
            if j + 1 < len(what.steps):
                e.add(f"s{j} = s{j}.to({y}.dtype.element_ty)")
            e.add(f"tl.store({y} + row * ({width}) + {within}, s{j}{_mask(what, BLOCK)})")
            if j + 1 < len(what.steps):
                e.add(f"s{j} = s{j}.to(tl.float32)")


def _expression(step: Computed, operands: Sequence[str]) -> str:
    wanted = EXPRESSIONS.get(step.op)
    if wanted is None or wanted.count("{}") != len(operands):
        raise UsageError(f"codegen: row-wise kernels have no {step.op} of {len(operands)} operands")
    return wanted.format(*operands)


def _name(operand: Operand) -> str:
    if isinstance(operand, tuple):
        return f"{'a' if operand[0] == 'input' else 's'}{operand[1]}"
    return number(operand) if operand >= 0 else f"({number(operand)})"


def number(value: float) -> str:
    """A number as Python and Triton read it."""
    return repr(float(value)) if math.isfinite(value) else f'float("{float(value)}")'


def _norm(e: Emitter, result: str, step: Computed, operands: Sequence[str], *, masked: bool) -> None:
    x, *vectors = operands
    if step.op == "layer_norm":
        e.add(f"{result} = {x} - tl.sum({f'tl.where(columns < D, {x}, 0.0)' if masked else x}, 0) / D")
        x = result
    squared = f"tl.where(columns < D, {x} * {x}, 0.0)" if masked else f"{x} * {x}"
    e.add(f"{result} = {x} * tl.rsqrt(tl.sum({squared}, 0) / D + {step.eps!r})")
    for sign, vector in zip(("*", "+"), vectors, strict=False):
        e.add(f"{result} = {result} {sign} {vector}")

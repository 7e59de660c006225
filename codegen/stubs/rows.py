"""Tests of row-wise chains and of embeddings."""

from collections.abc import Iterator

from fuser.codegen.elementwise import NORMS, Computed, Elementwise, Row, number
from fuser.codegen.embedding import Embedding
from fuser.codegen.kernel import Kernel
from fuser.codegen.stubs.linear import joined, normed
from fuser.codegen.stubs.parts import ACTIVATIONS, Parts, listed

EXPRESSIONS = {
    "Add": "{} + {}",
    "Sub": "{} - {}",
    "Mul": "{} * {}",
    "Div": "{} / {}",
    "Neg": "-{}",
    "Abs": "{}.abs()",
    "Sqrt": "{}.sqrt()",
    "Rsqrt": "{}.rsqrt()",
    "Reciprocal": "1.0 / {}",
    "Exp": "{}.exp()",
    "Log": "{}.log()",
    "Sigmoid": "{}.sigmoid()",
    "Tanh": "{}.tanh()",
    "Erf": "{}.erf()",
    "Relu": "{}.relu()",
    "Max": "torch.maximum(*map(torch.as_tensor, ({}, {})))",
    "Min": "torch.minimum(*map(torch.as_tensor, ({}, {})))",
    "Clip": "{}.clamp({}, {})",
    "Cast": "{}",
    "Identity": "{}",
    **ACTIVATIONS,
}
POSITIVE = frozenset({"Div", "Sqrt", "Rsqrt", "Reciprocal", "Log", "Exp"})  # of inputs away from 0


def elementwise(what: Elementwise, kernel: Kernel) -> Parts:
    """Operators one after another; what is stored is rounded before it is read on."""
    grouped = what.groups > 1
    width = "GROUPS * D" if grouped else "D"
    positive = ".abs() + 0.5" if any(step.op in POSITIVE for step in what.steps) else ""
    names = [f"x{i}" for i in range(len(what.inputs))]
    shapes = {
        name: f"drawn({f'tokens, {width}' if isinstance(kind, Row) else 'D'}){positive}"
        for name, kind in zip(names, what.inputs, strict=True)
    }
    shapes |= {f"y{i}": f"unwritten(tokens, {width})" for i in range(len(what.outputs))}
    body = [
        f"{name} = {name}.double()" + (".unflatten(-1, (GROUPS, D))" if grouped and isinstance(kind, Row) else "")
        for name, kind in zip(names, what.inputs, strict=True)
    ]
    for j, step in enumerate(what.steps):
        body += _step(j, step)
        if j in what.outputs and j + 1 < len(what.steps):
            body.append(f"s{j} = s{j}.to(DTYPE).double()  # as it is stored")
    flat = ".flatten(1)" if grouped else ""
    outputs = ", ".join(f'"y{i}": s{j}{flat}' for i, j in enumerate(what.outputs))
    definition = [f"def definition({', '.join(names)}, **_):", *(f"    {line}" for line in body)]
    definition.append(f"    return {{{outputs}}}")
    constants = [f"GROUPS, D = {what.groups!r}, {what.D!r}" if grouped else f"D = {what.D!r}"]
    inputs = f"def inputs(tokens):\n{listed(shapes)}"
    return Parts("(1, 5)", joined([inputs, "\n".join(definition)]), tuple(constants))


def _step(j: int, step: Computed) -> Iterator[str]:
    operands = [
        number(operand) if not isinstance(operand, tuple) else f"{'x' if operand[0] == 'input' else 's'}{operand[1]}"
        for operand in step.operands
    ]
    if step.op in NORMS:
        x, *vectors = operands
        yield f"s{j} = {x}"
        yield from normed(step.op.removesuffix("_norm"), step.eps, f"s{j}")
        for sign, vector in zip("*+", vectors, strict=False):
            yield f"s{j} = s{j} {sign} {vector}"
    elif step.op == "gated":
        yield f"s{j} = {ACTIVATIONS[step.activation].format(operands[0])} * {operands[1]}"
    else:
        yield f"s{j} = {EXPRESSIONS[step.op].format(*operands)}"


def embedding(what: Embedding, kernel: Kernel) -> Parts:
    """The sum of tables' rows; an id outside its table gives NaN."""
    shapes: dict[str, str] = {}
    for i, rows in enumerate(what.rows):
        shapes[f"ids{i}"] = f"torch.randint({rows!r}, [tokens], device=DEVICE).int()"
        shapes[f"table{i}"] = f"drawn({rows!r}, D)"
    total = " + ".join(f"table{i}[ids{i}.long()].double()" for i in range(len(what.rows)))
    scaled = f"({total}) * {what.scale!r}" if what.scale != 1.0 else total
    inputs = f"def inputs(tokens):\n{listed(shapes | {'y': 'unwritten(tokens, D)'})}"
    definition = f'def definition({", ".join(shapes)}, **_):\n    return {{"y": {scaled}}}'
    return Parts("(1, 5)", joined([inputs, definition]), (f"D = {what.D!r}",))

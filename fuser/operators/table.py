"""The operator table: which function computes which operator, and how a node's inputs and attributes reach it.

A function's signature is its row. Positional parameters are the operator's inputs in order, keyword-only parameters its
attributes, both under their ONNX names; a parameter without a default is required, unless it may be None. What moved from
attribute to input over the opsets (axes, pads, split, ...) is declared once, as an input, and an attribute of that name
fills it when the input is absent. Keyword-only parameters named in `CONTEXT` are facts of the call, not attributes of the
node.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from fuser.errors import FuserError, UnsupportedOperator

CONTEXT = frozenset({"outputs", "opset", "float_dtype"})

# What torch and Python raise when inputs or attributes do not fit an operator.
MISFITS = (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)

Ints = Tensor | Sequence[int] | int

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Row:
    """One operator: the function that computes it, and what its signature says."""

    compute: Callable[..., Any]
    inputs: tuple[str, ...]
    required: frozenset[str]
    attributes: frozenset[str]
    context: frozenset[str]
    variadic: bool
    whole: frozenset[str] = frozenset()  # inputs that may be given as Python integers


TABLE: dict[tuple[str, str], Row] = {}  # by domain ("" is ai.onnx) and operator


def operator(*names: str, domain: str = "") -> Callable[[F], F]:
    """Enters the decorated function in the table under each of `names`."""

    def enter(compute: F) -> F:
        parameters = inspect.signature(compute).parameters.values()
        whole = frozenset(p.name for p in parameters if Sequence[int] in get_args(p.annotation))
        keywords = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        row = Row(
            compute=compute,
            inputs=tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
            required=frozenset(p.name for p in parameters if _is_required(p)),
            attributes=keywords - CONTEXT,
            context=keywords & CONTEXT,
            variadic=any(p.kind is p.VAR_POSITIONAL for p in parameters),
            whole=whole,
        )
        for name in names:
            TABLE[domain, name] = row
        return compute

    return enter


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind is not parameter.VAR_POSITIONAL and parameter.default is parameter.empty
    return named and type(None) not in get_args(parameter.annotation)


def default(op: str, domain: str, attribute: str) -> Any:
    """The value an operator takes for an attribute that is left out; None where there is none."""
    row = row_of(op, domain)
    parameter = inspect.signature(row.compute).parameters.get(attribute) if row is not None else None
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def row_of(op: str, domain: str = "") -> Row | None:
    """The table's row for `op`, if it has one."""
    return TABLE.get((_plain(domain), op))


def supported(op: str, domain: str = "") -> bool:
    """Whether the table defines `op`; it may still refuse a form of it with UnsupportedOperator."""
    return row_of(op, domain) is not None


@torch.no_grad()
def evaluate(
    op: str,
    domain: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[Tensor | None],
    *,
    outputs: int = 1,
    opset: int = 23,
    float_dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """The outputs of one node. They may alias the inputs.

    Attributes are plain Python values: int, float, str, lists of them, a torch.Tensor or numpy array where ONNX has a
    tensor, an ONNX data type code where ONNX has a dtype. An absent optional input is None or left off the end.

    Output dtypes are ONNX's. float16 and bfloat16 contractions, normalizations, activations and reductions are computed
    in float32 and rounded once. With `float_dtype`, an operator that would choose a floating dtype itself (Cast,
    Constant, stash_type, ...) uses that one, so that a region fed float64 inputs stays in float64 throughout.

    The list has exactly `outputs` entries; an output that the operator does not produce is None. Semantics are those
    of opset 23 and later; `opset` matters only where an older version computes something else.

    Raises UnsupportedOperator for an operator, attribute or dtype outside the table, and FuserError when the inputs do
    not fit the operator.
    """
    row = row_of(op, domain)
    name = f"{domain}.{op}" if _plain(domain) else op
    if row is None:
        raise UnsupportedOperator(f"{name}: no such operator in the table")
    arguments, keywords = bind(row, name, attributes, inputs)
    facts = {"outputs": outputs, "opset": opset, "float_dtype": float_dtype}
    keywords |= {fact: facts[fact] for fact in row.context}
    try:
        result = row.compute(*arguments, **keywords)
    except UnsupportedOperator as error:
        raise UnsupportedOperator(f"{name}: {error}") from error
    except FuserError as error:
        raise FuserError(f"{name}: {error}") from error
    except MISFITS as error:
        found = ", ".join("absent" if x is None else f"{_short(x.dtype)}{list(x.shape)}" for x in inputs)
        raise FuserError(f"{name}: inputs ({found}) with attributes {dict(attributes)} do not fit: {error}") from error
    results = list(result) if isinstance(result, tuple) else [result]
    return (results + [None] * outputs)[:outputs]


def bind(row: Row, name: str, attributes: Mapping[str, Any], inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the keyword arguments of a node's function, less the facts of the call.

    Raises UnsupportedOperator for an attribute or input the function does not take, FuserError for one it lacks.
    """
    if row.variadic:
        if not inputs or any(x is None for x in inputs):
            raise FuserError(f"{name}: needs one or more inputs, all present")
        arguments: list[Any] = list(inputs)
    else:
        if len(inputs) > len(row.inputs):
            raise UnsupportedOperator(f"{name}: takes inputs ({', '.join(row.inputs)}), got {len(inputs)}")
        arguments = [*inputs, *[None] * (len(row.inputs) - len(inputs))]
    keywords: dict[str, Any] = {}
    for attribute, value in attributes.items():
        if attribute in row.attributes:
            keywords[attribute] = value
        elif attribute not in row.inputs:
            raise UnsupportedOperator(f"{name}: unknown attribute {attribute}")
        elif arguments[position := row.inputs.index(attribute)] is None:
            arguments[position] = value
        else:
            raise FuserError(f"{name}: {attribute} is given both as an input and as an attribute")
    missing = {key for key, value in zip(row.inputs, arguments, strict=False) if value is None}
    missing |= row.attributes - keywords.keys()
    if absent := sorted(missing & row.required):
        raise FuserError(f"{name}: {', '.join(absent)} is required and absent")
    return arguments, keywords


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ints(value: Ints) -> list[int]:
    """Integers that arrive as a tensor input, a list attribute or one number."""
    if isinstance(value, Tensor):
        return [int(i) for i in value.reshape(-1).tolist()]
    return [value] if isinstance(value, int) else [int(i) for i in value]


def one_int(value: Ints) -> int:
    """One integer that arrives as a tensor of one element, a list of one element or a number."""
    (number,) = ints(value)
    return number


def axis_of(axis: int, rank: int) -> int:
    """`axis` counted from the front; raises FuserError when outside [-rank, rank)."""
    if not -rank <= axis < max(rank, 1):
        raise FuserError(f"axis must be in [{-rank}, {rank}), got {axis}")
    return axis % rank if rank else 0


def same_dtype(*tensors: Tensor | None) -> None:
    """Raises FuserError unless the tensors present have one dtype: torch would promote where ONNX refuses."""
    found = {x.dtype for x in tensors if x is not None}
    if len(found) > 1:
        raise FuserError(f"inputs must have one dtype, got {' and '.join(sorted(map(_short, found)))}")


def float32(number: float) -> float:
    """The nearest float32: what an ONNX attribute written as `number` holds."""
    return torch.tensor(number, dtype=torch.float32).item()


def scalar_like(value: Tensor | float, x: Tensor) -> Tensor:
    """One number, given as a tensor of one element or an attribute, as a scalar of x's dtype and device.

    A number beyond the dtype's range becomes infinite.
    """
    exact = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return exact.reshape(()).to(x.device, x.dtype)


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that accumulates it: float16 and bfloat16 go to float32, everything else stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

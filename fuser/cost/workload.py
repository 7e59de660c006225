"""What a model asks for, operator by operator: parameters, multiply-adds, activations, keys and values.

A Shape states sizes; `of_shape` counts what follows from them. `fuser.cost.analysis` counts the same of a fused graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from fuser.cost.gpus import tables, text_of
from fuser.errors import InputError, UsageError


@dataclass(frozen=True)
class Operator:
    """One operator of a decode step, as often as a model has it.

    Attributes:
        count: how often the model has it; what follows is of one.
        weights: elements of the parameters by group; `vectors` are norms and biases.
        is_quantizable: whether the weights are of a product that quantization makes codes of.
        is_table: whether a step reads no more of the weights than a row for each token.
        macs: multiply-adds of a token, without those of keys.
        macs_per_key: multiply-adds of a token for each key that it sees.
        whole, split: elements of activations read and written for a token: what each of several cards has all of, and what
            is divided among them.
        kv: elements of keys and values that a token adds, and that a step reads for each key.
        reduced: elements that cards add up after it, for a token, where the weights are divided by rows.
    """

    name: str
    count: int = 1
    weights: Mapping[str, int] = field(default_factory=dict)
    vectors: int = 0
    is_quantizable: bool = False
    is_table: bool = False
    macs: int = 0
    macs_per_key: int = 0
    whole: int = 0
    split: int = 0
    kv: int = 0
    reduced: int = 0

    @property
    def parameters(self) -> int:
        return sum(self.weights.values())


@dataclass(frozen=True)
class Workload:
    """The operators of a model.

    Attributes:
        kv_heads: into how many parts a cache can be divided; head_dim: channels of a head.
        live: elements of activations that are held for a token at once.
    """

    name: str
    operators: tuple[Operator, ...]
    kv_heads: int
    head_dim: int
    live: int = 0

    @property
    def parameters(self) -> int:
        """All weights of products and tables."""
        return sum(op.count * op.parameters for op in self.operators)

    @property
    def kv(self) -> int:
        """Elements of keys and values that a token adds."""
        return sum(op.count * op.kv for op in self.operators)


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as `shapes.toml` states them."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    gated: bool
    vocabulary: int
    tied: bool
    norm: str
    bias: bool
    positions: str

    @property
    def parameters(self) -> int:
        """All of them, norms and biases included."""
        return sum(op.count * (op.parameters + op.vectors) for op in of_shape(self).operators)


def shapes(extra: Path | None = None) -> dict[str, Shape]:
    """The shapes that are known, by name.

    Raises:
        InputError: the file is not as it must be.
    """
    found = _read(files("fuser.models").joinpath("shapes.toml").read_text(encoding="utf-8"), "shapes.toml")
    return found | (_read(text_of(extra), str(extra)) if extra is not None else {})


def shape_named(name: str, extra: Path | None = None) -> Shape:
    """A shape by name, upper or lower case.

    Raises:
        UsageError: none has that name.
    """
    known = shapes(extra)
    by_name = {key.lower(): shape for key, shape in known.items()}
    if name.lower() not in by_name:
        raise UsageError(f"'{name}' is neither a file, nor a folder, nor one of {', '.join(known)}")
    return by_name[name.lower()]


def _read(text: str, where: str) -> dict[str, Shape]:
    found = {}
    for name, table in tables(text, where).items():
        wanted = {field.name: field.type for field in fields(Shape) if field.name != "name"}
        if table.keys() != wanted.keys():
            odd = ", ".join(sorted(table.keys() ^ wanted.keys()))
            raise InputError(f"'{where}': [{name}] must have {', '.join(wanted)}, and nothing else: {odd}")
        for key, kind in wanted.items():
            value = table[key]
            least = 0 if key in ("vocabulary", "feed_forward") else 1
            if type(value) is not kind or (kind is int and value < least):
                raise InputError(f"'{where}': [{name}]: {key} must be {kind_text(kind)}, got {value!r}")
        if table["norm"] not in ("rms", "layer", "none"):
            raise InputError(f"'{where}': [{name}]: norm must be rms, layer or none, got {table['norm']!r}")
        found[name] = Shape(name, **table)
    return found


def kind_text(kind: Any) -> str:
    return {int: "a whole number", bool: "true or false", str: "a text"}[kind]


def of_shape(shape: Shape) -> Workload:
    """A decode step's operators; activations are in memory between launches, as if these were one an operator.

    A norm reads a row and what is added to it, and writes both results; an activation and a gate are in the product before.
    """
    D, F, V, L = shape.hidden, shape.feed_forward, shape.vocabulary, shape.layers
    HDh, GDh = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    scale = {"rms": D, "layer": 2 * D, "none": 0}[shape.norm]
    qkv = {"q": D * HDh, "k": D * GDh, "v": D * GDh}
    wide = F * (2 if shape.gated else 1)

    def linear(name: str, weights: dict[str, int], whole: int, split: int, bias: int, reduced: int = 0) -> Operator:
        vectors = bias if shape.bias else 0
        return Operator(
            name, L, weights, vectors, is_quantizable=True, macs=sum(weights.values()), whole=whole, split=split,
            reduced=reduced,
        )  # fmt: skip

    operators = [
        Operator("norm A", L, vectors=scale, whole=4 * D),
        linear("qkv", qkv, D, HDh + 2 * GDh, HDh + 2 * GDh),
        Operator("attention", L, macs_per_key=2 * HDh, split=2 * HDh, kv=2 * GDh),
        linear("o", {"o": HDh * D}, D, HDh, D, D),
        Operator("norm B", L, vectors=scale, whole=4 * D),
        linear("feed-forward A", {"feed-forward A": D * wide}, D, F, wide),
        linear("feed-forward B", {"feed-forward B": F * D}, D, F, D, D),
    ]
    if V:
        operators.insert(0, Operator("embedding", 1, {"embedding": V * D}, is_table=not shape.tied, whole=2 * D))
        head = {} if shape.tied else {"head": V * D}
        operators.append(Operator("norm", 1, vectors=scale, whole=3 * D))
        operators.append(Operator("head", 1, head, macs=V * D, whole=D, split=V))
    live = 2 * D + max(F, HDh + 2 * GDh) + V
    return Workload(shape.name, tuple(operators), shape.kv_heads, shape.head_dim, live)

"""Row-wise chains, embeddings and choices of tokens against torch, in Triton's interpreter or on the GPU that is there."""

from tests.interpreter import DEVICE  # isort: skip

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from fuser.codegen.elementwise import EXPRESSIONS, Column, Computed, Elementwise, Row, elementwise
from fuser.codegen.embedding import Embedding, embedding
from fuser.errors import UsageError
from tests.test_codegen_kernels import DTYPES, _cache_folder, close, drawn, launch, unwritten  # noqa: F401

X, Y, Z = ("input", 0), ("input", 1), ("input", 2)
MEANINGS: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Neg": torch.neg, "Abs": torch.abs,
    "Sqrt": torch.sqrt, "Rsqrt": torch.rsqrt, "Reciprocal": torch.reciprocal, "Exp": torch.exp, "Log": torch.log,
    "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf, "Relu": torch.relu, "Max": torch.maximum,
    "Min": torch.minimum, "Clip": torch.clamp, "Cast": torch.clone, "Identity": torch.clone, "silu": functional.silu,
    "gelu": functional.gelu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("op", EXPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_operator(op: str, dtype: str) -> None:
    count = EXPRESSIONS[op].count("{}")
    what = Elementwise(33, (Row(),) * count, (Computed(op, (X, Y, Z)[:count]),), (0,), dtype=dtype)
    given = [drawn(3, 33, dtype=dtype) for _ in range(count)]
    if op in ("Sqrt", "Rsqrt", "Log", "Reciprocal"):
        given = [x.abs() + 0.5 for x in given]
    if op == "Div":
        given[1] = given[1].abs() + 0.5
    y = unwritten(3, 33, dtype=dtype)
    launch(elementwise(what), *given, y)
    close(y, MEANINGS[op](*(x.double() for x in given)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "D"), [(1, 64), (3, 90), (2, 1)])
def test_norms_around_a_residual(dtype: str, rows: int, D: int) -> None:
    """rms_norm(x) * w + residual, stored, and a layer norm of it."""
    steps = (
        Computed("rms_norm", (X, ("input", 2)), eps=1e-5),
        Computed("Add", (("step", 0), Y)),
        Computed("layer_norm", (("step", 1), ("input", 2), ("input", 3)), eps=1e-3),
    )
    what = Elementwise(D, (Row(), Row(), Column(), Column()), steps, (1, 2), dtype=dtype)
    x, residual, w, b = drawn(rows, D, dtype=dtype), drawn(rows, D, dtype=dtype), *(drawn(D, dtype=dtype) for _ in "wb")
    total, y = unwritten(rows, D, dtype=dtype), unwritten(rows, D, dtype=dtype)
    launch(elementwise(what), x, residual, w, b, total, y)
    expected = functional.rms_norm(x.double(), (D,), w.double(), 1e-5) + residual.double()
    close(total, expected, dtype)
    if D > 1:  # of one element a layer norm is its shift
        close(y, functional.layer_norm(total.double(), (D,), w.double(), b.double(), 1e-3), dtype)
    else:
        assert torch.equal(y, b.expand(rows, 1))


def test_groups_of_strided_rows_and_numbers() -> None:
    """A norm of each head of a part of a wider row, scaled by a number."""
    steps = (Computed("rms_norm", (X, Y), eps=1e-6), Computed("Mul", (("step", 0), -0.5)))
    what = Elementwise(20, (Row(), Column()), steps, (1,), groups=3, dtype="fp32")
    packed, w, y = drawn(4, 100, dtype="fp32"), drawn(20, dtype="fp32"), unwritten(4, 60, dtype="fp32")
    launch(elementwise(what), packed[:, 40:], w, y)
    heads = packed[:, 40:].double().unflatten(-1, (3, 20))
    close(y, (functional.rms_norm(heads, (20,), w.double(), 1e-6) * -0.5).flatten(1), "fp32")


def test_rows_wider_than_a_tile_and_gates() -> None:
    what = Elementwise(1500, (Row(), Row()), (Computed("gated", (X, Y), activation="silu"),), (0,), dtype="fp32")
    gate, up, y = drawn(2, 1500, dtype="fp32"), drawn(2, 1500, dtype="fp32"), unwritten(2, 1500, dtype="fp32")
    launch(elementwise(what), gate, up, y)
    close(y, functional.silu(gate.double()) * up.double(), "fp32")
    launch(elementwise(what), gate[:0], up[:0], y[:0])  # no row, no launch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 90, 1500])
@pytest.mark.parametrize("tables", [1, 2])
def test_embedding(dtype: str, D: int, tables: int) -> None:
    rows = (11, 5)[:tables]
    held = [drawn(count, D, dtype=dtype) for count in rows]
    ids = [torch.tensor([3, 0, 4, 1], dtype=torch.int32, device=DEVICE) for _ in rows]
    y = unwritten(4, D, dtype=dtype)
    given = [tensor for pair in zip(ids, held, strict=True) for tensor in pair]
    launch(embedding(Embedding(D, rows, 2.5, dtype)), *given, y)
    total = sum(table.double()[index.long()] for table, index in zip(held, ids, strict=True))
    assert isinstance(total, Tensor)
    close(y, total * 2.5, dtype)


def test_an_id_outside_the_table_gives_nan() -> None:
    table, y = drawn(5, 8, dtype="fp32"), unwritten(4, 8, dtype="fp32").zero_()
    ids = torch.tensor([4, 5, -1, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    launch(embedding(Embedding(8, (5,), dtype="fp32")), ids, table, y)
    assert torch.equal(y[0], table[4]) and y[1:].isnan().all()


def test_nan_small_numbers_and_open_bounds() -> None:
    steps = (
        Computed("Relu", (X,)),
        Computed("Clip", (X, float("-inf"), 1.0)),
        Computed("Tanh", (X,)),
        Computed("Min", (X, Y)),
    )
    what = Elementwise(6, (Row(), Row()), steps, (0, 1, 2, 3), dtype="fp32")
    values = torch.tensor([[float("nan"), 1e-4, -0.19, 0.21, -30.0, 2.0]], device=DEVICE)
    made = [unwritten(1, 6, dtype="fp32") for _ in steps]
    launch(elementwise(what), values, torch.zeros_like(values), *made)
    x = values.double()
    for found, expected in zip(made, (x.relu(), x.clamp(max=1.0), x.tanh(), x.clamp(max=0.0)), strict=True):
        assert torch.allclose(found.double(), expected, rtol=3e-7, atol=0.0, equal_nan=True)


def test_what_the_families_do_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="no Sin of 1 operands"):
        elementwise(Elementwise(8, (Row(),), (Computed("Sin", (X,)),), (0,)))
    with pytest.raises(UsageError, match="at most 65536"):
        elementwise(Elementwise(70000, (Row(), Column()), (Computed("rms_norm", (X, Y)),), (0,)))
    with pytest.raises(UsageError, match="has a table"):
        embedding(Embedding(8, ()))

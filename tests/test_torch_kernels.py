"""Every kernel made of torch's own functions, against the reference function in float64 on the operator's examples."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fuser import dims, patterns
from fuser.dtypes import DType
from fuser.fused import Argument, FusedOp
from fuser.runtime.torch_kernels import KERNELS
from fuser.tensors import to_tensor
from tests import instances

# Relative, norm-wise: that of the lowerings (tests/test_fused_ops.py).
TOLERANCE = {DType.FLOAT32: 2e-6, DType.FLOAT16: 2e-3, DType.BFLOAT16: 1.6e-2}

EXAMPLES = [
    pytest.param(operator, example, id=f"{operator.name}-{number}")
    for operator in patterns.ALL
    if operator.name in KERNELS
    for number, example in enumerate(operator.example_sets)
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _inputs(
    operator: FusedOp, example: dict[str, Any], dtype: DType
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Inputs of one call in a type, and the same for the reference in float64."""
    random = np.random.RandomState(0)
    given: list[Tensor | None] = []
    exact: list[Tensor | None] = []
    for argument in operator.signature.inputs:
        if argument.name in example.get("without", ()):
            given.append(None)
            exact.append(None)
            continue
        kind = instances.kind_of(argument.name, example)
        if kind == "sizes":
            wanted = instances.shape_of(Argument("", ("*M",)), example)
            array = np.array(dims.concrete(wanted, instances.sizes(example)))
        else:
            shape = dims.concrete(instances.shape_of(argument, example), instances.sizes(example))
            array = instances.drawn(random, shape, kind, dtype)
        given.append(to_tensor(array))
        exact.append(instances.exact(array, kind))
    return given, exact


def _tensors(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, (tuple, list)) else [found]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("operator", "example"), EXAMPLES)
def test_kernel_equals_reference(operator: FusedOp, example: dict[str, Any], dtype: DType, device: str) -> None:
    given, exact = _inputs(operator, example, dtype)
    attributes = instances.attributes_of(example)
    expected = _tensors(operator.reference(*exact, **attributes))
    on_device = [None if x is None else x.to(device) for x in given]
    before = [None if x is None else x.clone() for x in on_device]
    actual = _tensors(KERNELS[operator.name](*on_device, **attributes))
    assert len(actual) == len(expected)
    for found, wanted in zip(actual, expected, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == (torch.bool if wanted.dtype == torch.bool else dtype.torch)
        defined = ~wanted.isnan()
        assert defined.any()
        difference = found.cpu().double()[defined] - wanted.double()[defined]
        assert difference.norm() <= TOLERANCE[dtype] * wanted.double()[defined].norm()
    for x, y in zip(on_device, before, strict=True):  # nothing is written into an input
        assert x is None or y is None or torch.equal(x, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 9), (5, 9), (7, 7)])
@pytest.mark.parametrize("kind", [None, "bool", "lowest", "infinite"])
@pytest.mark.parametrize("layout", ["heads", "tokens"])
def test_attention_of_every_form(
    layout: str, kind: str | None, tokens: tuple[int, int], heads: tuple[int, int], device: str
) -> None:
    """One token and many, each head alone or in groups, all forms of masks, rows that attend to nothing among them."""
    (H, G), (S, T), D = heads, tokens, 8
    random = np.random.RandomState(1)
    q, k, v = (torch.from_numpy(random.standard_normal((2, n, m, D))).float() for n, m in ((H, S), (G, T), (G, T)))
    operator = next(operator for operator in patterns.ALL if operator.name == "attention")
    for shape in ((2, 1, S, T), (2, 1, 1, T), (1, 1, S, T), (S, T), (2, H, S, T)):
        mask = None if kind is None else to_tensor(instances.drawn(random, shape, kind, DType.FLOAT32))
        inputs = [x if layout == "heads" else x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        for merged in (False, True):
            options = {"heads": heads, "scale": 0.3, "softcap": 0.0, "guarded": True, "merged": merged}
            expected = operator.reference(*inputs, mask, **options)
            given = [None if x is None else x.to(device) for x in (*inputs, mask)]
            actual = KERNELS["attention"](*given, **options).cpu()
            assert actual.shape == expected.shape and not actual.isnan().any()
            assert (actual - expected).norm() <= 4e-6 * expected.norm()

"""`torch.compile(model, backend="fuser")`: the same numbers, and a reason wherever a graph runs as it was captured."""

import logging
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuser import dynamo
from fuser.checking import relative_error
from tests import architectures
from tests.architectures import V
from tests.test_coverage import LLAMA

TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo.fallbacks.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def test_it_is_an_entry_point() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="fuser")
    assert entry.load() is dynamo.backend


def test_a_model_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every size, fused, and never as it was captured."""
    captured: list[Any] = []

    def backend(module: Any, example_inputs: Any) -> Any:
        captured.append(dynamo.backend(module, example_inputs))
        return captured[-1]

    model = architectures.model("llama")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for B, S in ((2, 7), (2, 9), (3, 4)):
            ids = torch.randint(0, V, (B, S))
            found, wanted = (one(ids, use_cache=False).logits for one in (compiled, model))
            assert relative_error(found, wanted) <= TOLERANCE
    assert dynamo.fallbacks == []
    fused = captured[0].compilation.first.report.fused
    # All sizes are fixed in the first graph, so its tables of sines are constants, and its rotary embedding stays as it is.
    assert fused == {
        kind: n for kind, n in LLAMA.items() if kind not in ("attention_mask", "rotary_cache_write", "rotary_table")
    }


def test_an_operator_that_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    compiled, x = torch.compile(Spectrum(), backend=dynamo.backend), torch.randn(3, 8)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fuser"):
        for _ in range(3):
            assert torch.equal(compiled(x), Spectrum()(x))
    assert len(dynamo.fallbacks) == 1 and "fft" in dynamo.fallbacks[0]
    assert [record.message for record in caplog.records if record.name == "fuser"] == [
        f"a graph of torch.compile runs as it was captured: {dynamo.fallbacks[0]}"
    ]


def test_a_break_in_the_graph() -> None:
    """Each part is a graph of its own, and each is fused or not."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    model, x = Broken(), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=dynamo.backend)(x), model(x))
    assert dynamo.fallbacks == []


def test_gradients_are_torchs() -> None:
    model, x = Block(), torch.randn(3, 8)
    compiled = torch.compile(model, backend=dynamo.backend)
    compiled(x).sum().backward()
    got = model.up.weight.grad
    model.up.weight.grad = None
    model(x).sum().backward()
    torch.testing.assert_close(got, model.up.weight.grad)
    assert dynamo.fallbacks and "gradients" in dynamo.fallbacks[0]


def test_parameters_that_are_written_to() -> None:
    model, x = Block(), torch.randn(3, 8)
    compiled = torch.compile(model, backend=dynamo.backend)
    with torch.no_grad():
        compiled(x)
        model.up.weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))

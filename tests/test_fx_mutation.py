"""Operators in place: read as they stand where nothing else sees what they change, otherwise by way of torch; right in both."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fuser
from fuser.errors import InputError
from fuser.fx import export_module, import_program
from fuser.runtime.executor import Executor


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Any:
        y = x * 2
        y += x
        y.mul_(3).clamp_(min=-1)
        return y - 1


class Chained(nn.Module):
    """One tensor under several names."""

    def forward(self, x: Tensor) -> Any:
        y = x + 1
        z = y.add_(x)
        y.mul_(2)
        w = z.sub_(x)
        return w, y * 1, z


class ThroughView(nn.Module):
    """A view that is made after, and the whole of a tensor that nothing reads but by a view."""

    def forward(self, x: Tensor) -> Any:
        y = x.exp()
        y.div_(2)
        flat = y.view(-1)
        flat.relu_()
        return flat.sum()


class Filled(nn.Module):
    def forward(self, x: Tensor) -> Any:
        y, z = torch.empty_like(x), x + 1
        y.fill_(2.5)
        z.zero_()
        w = torch.empty_like(x).copy_(x[:1])
        w.masked_fill_(x > 0, 7)
        index = torch.zeros_like(x, dtype=torch.int64)
        v = torch.zeros_like(x).scatter_(0, index, 3.0)
        u = torch.ones_like(x)
        u[torch.tensor([0, 1])] = 5
        return y, z, w, v, u


class ItsOwnAlias(nn.Module):
    def forward(self, x: Tensor) -> Any:
        y = x + 1
        return y.add_(y.view_as(y))


READ = [Plain, Chained, ThroughView, Filled, ItsOwnAlias]


class ViewBefore(nn.Module):
    def forward(self, x: Tensor) -> Any:
        y = x * 2
        flat, turned = y.view(-1), y.t()
        y += 1
        return flat * 2, turned + 1


class PartOfIt(nn.Module):
    def forward(self, x: Tensor) -> Any:
        y = x * 2
        y[:, 0] = 1
        y[1:].mul_(3)
        first, second = y.chunk(2, -1)
        second.neg_()
        return y, first


class NoCopy(nn.Module):
    """What gives its argument itself: a cast to the same type, contiguous, a reshape to the same shape."""

    def forward(self, x: Tensor) -> Any:
        y, z, w = x * 2, x * 3, x * 4
        shaped, cast, lined = y.reshape(x.shape), z.to(torch.float32), w.contiguous()
        y += 1
        z += 1
        w += 1
        return shaped * 2, cast * 2, lined * 2


class OutputBefore(nn.Module):
    def forward(self, x: Tensor) -> Any:
        y = x * 2
        z = y.view(-1)
        y.add_(1)
        return z


TRACED = [ViewBefore, PartOfIt, NoCopy, OutputBefore]


def agrees(kind: type[nn.Module]) -> None:
    program = export_module(kind(), (torch.randn(4, 6),), {})
    executor = Executor(import_program(program))
    for rows in (4, 2, 9):
        x = torch.randn(rows, 6)
        kept = x.clone()
        wanted, got = kind()(x), executor(x)
        for a, b in zip(got, [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=1e-6)
        assert torch.equal(x, kept)
    assert "_" in str(program.graph), "the program was left as it is"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    executor = Executor(import_program(torch.export.load(file)))
    assert all(torch.equal(a, b) for a, b in zip(executor(x), got, strict=True))


@pytest.mark.parametrize("kind", READ)
def test_read_as_they_stand(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("the program is traced again")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refused)
    agrees(kind)


@pytest.mark.parametrize("kind", TRACED)
def test_left_to_torch(kind: type[nn.Module]) -> None:
    agrees(kind)


class Scratch(nn.Module):
    """Buffers: one that is written before it is read, and one that counts."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.register_buffer("scratch", torch.zeros(6))
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.scratch.copy_(x.sum(0))
        if self.counts:
            self.total.add_(self.scratch)
        return x + self.scratch


def test_a_buffer_that_is_written_before_it_is_read() -> None:
    module, x = Scratch(counts=False), torch.randn(4, 6)
    made = fuser.compile(module, torch.randn(3, 6))
    for _ in range(2):
        assert torch.allclose(made(x), module(x))
    with pytest.raises(InputError, match="buffer 'total'"):
        fuser.compile(Scratch(counts=True), x)

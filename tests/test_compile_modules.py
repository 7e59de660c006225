"""fuser.compile of modules of every form: what they take, what they give, what they hold."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fuser
from tests.test_operators import error_of


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch.manual_seed(7)
    with torch.no_grad():
        yield


@dataclass
class Outcome:
    mean: Tensor
    spread: Tensor | None = None
    name: str = "outcome"


pytree.register_dataclass(Outcome)


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class Layer(nn.Module):
    """A linear, before what a subclass makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 5), nn.Parameter(torch.randn(5))
        self.register_buffer("shift", torch.randn(5))


class Mapped(Layer):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {"y": y, "z": {"relu": y.relu(), "size": 3, "none": None}, "text": "as it is"}


class Structured(Layer):
    def forward(self, x: Tensor) -> Outcome:
        y = self.linear(x)
        return Outcome(y.mean(-1), y.amax(-1))


class Named(Layer):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return Pair(y.amin(-1), y.amax(-1)), OrderedDict(first=y)


class Partial(Layer):
    def forward(self, x: Tensor) -> Any:
        return None, self.linear(x), [None, (x + 1,)]


class Passed(Layer):
    """An input, a parameter and a buffer as outputs, one of them twice."""

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return x, y, y, self.scale, self.shift, y.view_as(y)


class Keywords(Layer):
    def forward(self, x: Tensor, *, bias: Tensor | None = None, double: bool = False) -> Tensor:
        y = self.linear(x)
        y = y if bias is None else y + bias
        return 2 * y if double else y


class Nested(Layer):
    def forward(self, xs: tuple[Tensor, list[Tensor]], more: dict[str, Tensor]) -> Tensor:
        first, rest = xs
        return self.linear(first + rest[0] * rest[1]) + more["b"] - more["a"]


class Two(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) + self.linear(y * 2)


class Variadic(Layer):
    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return (self.linear(sum(xs)) if xs else self.shift) + sum(more.values())


class Sizes(Layer):
    """Sizes among the outputs, and tensors made of them."""

    def forward(self, x: Tensor) -> Any:
        return self.linear(x), x.shape[0], torch.arange(x.shape[1]), x.shape[0] * 2 + x.shape[1]


class Alone(Layer):
    def forward(self) -> Tensor:
        return self.linear.weight.sum(0) * 2 + self.shift.sum()


class Numbers(Layer):
    def forward(self, x: Tensor, factor: float, times: int = 1, kind: str = "plain") -> Tensor:
        return self.linear(x) * factor if kind == "plain" else self.linear(x) * times


class Indexed(Layer):
    """Writes into what it has made itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).clone()
        y[:, 0] = 1
        y[:, 1:3] += 2
        y.relu_()
        return y


class Chosen(Layer):
    """Of a size that depends on what a tensor holds."""

    def forward(self, x: Tensor) -> Tensor:
        y = x[x > 0]
        return torch.zeros(y.shape[0], 2) + y[:, None]


F64 = torch.float64
CASES: list[tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = [
    (Mapped, (torch.randn(3, 4, 6),), {}),
    (Structured, (torch.randn(3, 4, 6),), {}),
    (Named, (torch.randn(3, 4, 6),), {}),
    (Partial, (torch.randn(3, 4, 6),), {}),
    (Passed, (torch.randn(3, 4, 6),), {}),
    (Keywords, (torch.randn(3, 6),), {"bias": torch.randn(5)}),
    (Keywords, (torch.randn(3, 6),), {"double": True}),
    (Keywords, (), {"x": torch.randn(3, 6), "bias": torch.randn(3, 5)}),
    (Keywords, (), {"bias": torch.randn(3, 5), "x": torch.randn(3, 6)}),
    (
        Nested,
        ((torch.randn(3, 6), [torch.randn(3, 6), torch.randn(6)]), {"b": torch.ones(5), "a": torch.zeros(3, 5)}),
        {},
    ),
    (Two, (torch.randn(3, 6), torch.randn(3, 6)), {}),
    (Variadic, (), {"a": torch.randn(3, 5)}),
    (Variadic, (torch.randn(3, 6), torch.randn(3, 6)), {"a": torch.randn(5), "b": torch.randn(3, 5)}),
    (Sizes, (torch.randn(3, 4, 6),), {}),
    (Alone, (), {}),
    (Numbers, (torch.randn(3, 6), 2.5), {"kind": "plain"}),
    (Numbers, (torch.randn(3, 6), 2.5, 3), {"kind": "other"}),
    (Indexed, (torch.randn(3, 6),), {}),
    (Chosen, (torch.randn(3, 6),), {}),
]


def agree(got: Any, wanted: Any) -> None:
    found, spec = pytree.tree_flatten(got)
    expected, wanted_spec = pytree.tree_flatten(wanted)
    assert spec == wanted_spec and type(got) is type(wanted)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor):
            assert error_of(a, b) == ""
        else:
            assert a == b and type(a) is type(b)


def other_sizes(given: Any) -> Any:
    """The same with other sizes, where they are not those of weights."""

    def resized(x: Any) -> Any:
        return torch.randn([{3: 8, 4: 7}.get(size, size) for size in x.shape]) if isinstance(x, Tensor) else x

    return pytree.tree_map(resized, given)


@pytest.mark.parametrize("when", ["given examples", "when called"])
@pytest.mark.parametrize(("kind", "args", "kwargs"), CASES, ids=[kind.__name__ for kind, _, _ in CASES])
def test_modules(kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], when: str) -> None:
    module = kind()
    examples = None if when == "when called" else args if not kwargs else kwargs if not args else None
    made = fuser.compile(module, examples)
    agree(made(*args, **kwargs), module(*args, **kwargs))
    args, kwargs = other_sizes(args), other_sizes(kwargs)
    agree(made(*args, **kwargs), module(*args, **kwargs))
    assert len(made._compilation.variants) == 1, "other sizes were compiled anew"


def test_inputs_that_are_one_tensor() -> None:
    module, x = Two(), torch.randn(3, 6)
    for examples in ((x, x), (x, torch.randn(3, 6)), (x, x[:])):
        made = fuser.compile(module, examples)
        other = torch.randn(4, 6)
        agree(made(other, other), module(other, other))
        agree(made(other, other + 1), module(other, other + 1))


def test_one_row() -> None:
    """A size of one in the example is fixed; others are compiled when they come."""
    module = Structured()
    made = fuser.compile(module, torch.randn(1, 6))
    for rows in (1, 2, 5, 1):
        x = torch.randn(rows, 6)
        agree(made(x), module(x))


def test_forms_are_compiled_apart() -> None:
    module = Keywords()
    made = fuser.compile(module, torch.randn(3, 6))
    x = torch.randn(4, 6)
    agree(made(x), module(x))
    agree(made(x, double=True), module(x, double=True))
    agree(made(x, bias=x[0, :5]), module(x, bias=x[0, :5]))
    agree(made(x[None]), module(x[None]))
    assert len(made._compilation.variants) == 4


def test_what_is_given_is_never_written_to() -> None:
    made, x = fuser.compile(Passed(), torch.randn(3, 6)), torch.randn(4, 6)
    kept = x.clone()
    made(x)
    assert torch.equal(x, kept)


def test_buffers_and_parameters_of_its_own_move_with_it() -> None:
    module, x = Passed(), torch.randn(3, 6)
    made = fuser.compile(module, x).to(F64)
    wanted = copy.deepcopy(module).to(F64)(x.double())
    agree(made(x.double()), wanted)
    assert made.shift.dtype is made.scale.dtype is F64


def test_parameters_that_are_written_to() -> None:
    module, x = Two(), torch.randn(3, 6)
    made = fuser.compile(module, (x, x))
    before = made(x, x)
    module.linear.weight.mul_(2)
    agree(made(x, x), module(x, x))
    assert not torch.equal(made(x, x), before)
    variants = made._compilation.variants
    made(x, x)
    assert made._compilation.variants is variants and len(variants) == 1


def test_hooks_run_once() -> None:
    module, x = Two(), torch.randn(3, 6)
    module.register_forward_hook(lambda part, given, out: out * 3)
    module.linear.register_forward_pre_hook(lambda part, given: (given[0] + 1,))
    made = fuser.compile(module, (x, x))
    agree(made(x, x), module(x, x))
    made.register_forward_hook(lambda part, given, out: out + 1)
    agree(made(x, x), module(x, x) + 1)


def test_copies() -> None:
    module, x = Structured(), torch.randn(3, 6)
    made = fuser.compile(module, x)
    twin = copy.deepcopy(made)
    twin.linear.weight.zero_()
    agree(made(x), module(x))
    assert not torch.equal(twin(x).mean, made(x).mean)
    agree(twin(x), copy.deepcopy(twin)(x))


def test_dropout_and_training_mode() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    x = torch.randn(8, 6)
    made = fuser.compile(module, x)
    assert all(part.training for part in module.modules()), "the module is in the mode that it was in"
    got = made(x)
    agree(got, module.eval()(x))
    assert made.eval() is made


def test_inside_another_module() -> None:
    whole = nn.Sequential(nn.Linear(6, 6), Keywords())
    x = torch.randn(4, 6)
    wanted = whole(x)
    whole[1] = fuser.compile(whole[1], torch.randn(3, 6))
    agree(whole(x), wanted)
    with pytest.raises(fuser.UsageError, match="inference"):
        whole.train()

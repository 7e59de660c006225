"""What the FX importer and torch.export refuse: one typed error that says what, in which module, at which line."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fuser
from fuser.errors import InputError, UnsupportedOperator
from fuser.fx import export_module, import_program


@torch.library.custom_op("fuser_tests::thrice", mutates_args=())
def thrice(x: Tensor) -> Tensor:
    return 3 * x


@thrice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fuser_tests::thrice_in_place", mutates_args={"x"})
def thrice_in_place(x: Tensor) -> None:
    x.mul_(3)


@thrice_in_place.register_fake
def _(x: Tensor) -> None:
    return None


class Inner(nn.Module):
    """A linear, then what a subclass does on the line that is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("counter", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)  # here


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), inner])

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def place(kind: type[nn.Module]) -> str:
    """The place of the line that ends in `# here`."""
    lines, start = inspect.getsourcelines(kind.forward)
    (offset,) = [i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"{__file__}:{start + offset}"


class Fourier(Inner):
    def forward(self, x: Tensor) -> Any:
        x = self.linear(x)
        return torch.fft.rfft(x).abs()  # here


class Custom(Inner):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(x) + 1
        return thrice(y)  # here


class CustomInPlace(Inner):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(x) + 1
        thrice_in_place(y)  # here
        return y


class Random(Inner):
    def forward(self, x: Tensor) -> Any:
        return torch.rand_like(x) + x  # here


class Form(Inner):
    def forward(self, x: Tensor) -> Any:
        return torch.linalg.vector_norm(x, 3)  # here


class Drops(Inner):
    def forward(self, x: Tensor) -> Any:
        return nn.functional.dropout(x, 0.5, training=True)  # here


class Branch(Inner):
    def forward(self, x: Tensor) -> Any:
        x = self.linear(x)
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))  # here


class Complex(Inner):
    def forward(self, x: Tensor) -> Any:
        return torch.complex(x, x).real  # here


OPERATORS = {
    Fourier: "aten._fft_r2c.default",
    Custom: "fuser_tests.thrice.default",
    CustomInPlace: "fuser_tests.thrice_in_place.default",
    Random: "aten.rand",
    Form: "aten.linalg_vector_norm.default",
    Drops: "aten.dropout.default",
    Branch: "cond",
    Complex: "aten.complex.default",
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_outside_the_table(kind: type[nn.Module]) -> None:
    program = export_module(Outer(kind()), (torch.randn(3, 6),), {})
    with pytest.raises(UnsupportedOperator) as told:
        import_program(program)
    text = str(told.value)
    assert OPERATORS[kind] in text and "'layers.1'" in text and place(kind) in text, text
    assert "\n" not in text
    with pytest.raises(UnsupportedOperator, match=r"layers\.1"):
        fuser.compile(Outer(kind()), torch.randn(3, 6))


class Counts(Inner):
    def forward(self, x: Tensor) -> Any:
        self.counter.add_(x.sum(0))  # here
        return x + self.counter


def test_buffers_that_change() -> None:
    with pytest.raises(InputError) as told:
        import_program(export_module(Outer(Counts()), (torch.randn(3, 6),), {}))
    text = str(told.value)
    assert "buffer 'layers.1.counter'" in text and place(Counts) in text, text


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)  # here
        return x + 1


def test_inputs_that_change() -> None:
    with pytest.raises(InputError) as told:
        import_program(export_module(Writing(), (torch.randn(3, 6),), {}))
    assert "user input 'x'" in str(told.value) and place(Writing) in str(told.value)


class Decides(Inner):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:  # here
            return x + 1
        return x - 1


class Loops(Inner):
    def forward(self, x: Tensor) -> Any:
        for _ in range(int(x.abs().max())):  # here
            x = x + 1
        return x


class Escapes(Inner):
    def forward(self, x: Tensor) -> Any:
        return x * x.sum().item() if x.mean().item() > 0.5 else x  # here


class Breaks(Inner):
    def forward(self, x: Tensor) -> Any:
        raise KeyError("nothing of the kind")  # here


class Misfits(Inner):
    def forward(self, x: Tensor) -> Any:
        return x @ torch.ones(5, 3)  # here


CAPTURES = {
    Decides: "control flow depends on what a tensor holds",
    Loops: "depends on what a tensor holds",
    Escapes: "control flow depends on what a tensor holds",
    Breaks: "nothing of the kind",
    Misfits: "on float32[3, 6]: ",
}


@pytest.mark.parametrize("kind", CAPTURES)
def test_modules_that_are_not_captured(kind: type[nn.Module], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as told:
        export_module(Outer(kind()), (torch.randn(3, 6),), {})
    text = str(told.value)
    assert text.startswith("Outer cannot be captured") and CAPTURES[kind] in text and place(kind) in text, text
    assert "\n" not in text and len(text) < 500
    assert capfd.readouterr() == ("", ""), "torch says it in its own words as well"


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((), {}, "missing a required argument: 'x'"),
        ((torch.randn(3, 6), torch.randn(3, 6)), {}, "too many positional arguments"),
        ((torch.randn(3, 6),), {"y": 1}, "unexpected keyword argument 'y'"),
    ],
    ids=["missing", "too many", "unknown"],
)
def test_arguments_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=f"Outer cannot be captured: .*{found}"):
        export_module(Outer(Inner()), args, kwargs)
    with pytest.raises(InputError, match=f"Outer.*{found}"):
        fuser.compile(Outer(Inner()))(*args, **kwargs)


@pytest.mark.parametrize(
    ("x", "found"),
    [(torch.randn(3, 5), "on float32[3, 5]: "), (torch.randn(()), "on float32[]: "), ("text", "str")],
    ids=["size", "rank", "type"],
)
def test_inputs_that_do_not_fit(x: Any, found: str) -> None:
    with pytest.raises(InputError) as told:
        export_module(Outer(Inner()), (x,), {})
    text = str(told.value)
    assert text.startswith("Outer cannot be captured") and found in text and place(Inner) in text, text


def test_inputs_that_torch_refuses_when_it_computes() -> None:
    with pytest.raises(InputError, match="Outer itself fails on example inputs: .*dtype"):
        fuser.compile(Outer(Inner()), torch.zeros(3, 6, dtype=torch.int64))


def test_dynamic_shapes_that_do_not_fit() -> None:
    for shapes in ({"x": {1: Dim("width")}}, {"y": {0: Dim("rows")}}):
        with pytest.raises(InputError, match="Outer cannot be captured"):
            export_module(Outer(Inner()), (torch.randn(3, 6),), {}, shapes)


@pytest.mark.parametrize(("which", "names"), [("inputs", ["a", "b"]), ("outputs", [])])
def test_names_that_do_not_fit(which: str, names: list[str]) -> None:
    program = export_module(Outer(Inner()), (torch.randn(3, 6),), {})
    with pytest.raises(InputError, match=f"{len(names)} names are given for 1 {which}"):
        import_program(program, **{which: names})


class Counted(Inner):
    def forward(self, x: Tensor) -> Any:
        return torch.arange(x.long().sum().item()) * 2  # here


def test_sizes_that_depend_on_data() -> None:
    with pytest.raises(UnsupportedOperator, match="depends on what a tensor holds") as told:
        import_program(export_module(Outer(Counted()), (torch.ones(3, 6),), {}))
    assert place(Counted) in str(told.value) and "'layers.1'" in str(told.value)


def test_too_many_forms() -> None:
    made = fuser.compile(Inner())
    for rank in range(8):
        made(torch.randn(*[2] * rank, 6))
    with pytest.raises(InputError, match="8 forms"):
        made(torch.randn(*[2] * 8, 6))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((torch.relu,), "takes an nn.Module"),
        ((nn.ReLU(), 3), "example_inputs must be"),
    ],
)
def test_usage(given: tuple[Any, ...], match: str) -> None:
    with pytest.raises(fuser.UsageError, match=match):
        fuser.compile(*given)


def test_unknown_backend() -> None:
    with pytest.raises(fuser.UsageError, match="backends are auto"):
        fuser.compile(nn.ReLU(), backend="warp")

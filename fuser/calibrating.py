"""The second moments of products' inputs, product after product, each computed with what came of the products before it.

A graph is computed as far as the next product, window after window, and what nothing will read any more is let go; of a module
one layer after another is. Graphs are computed in float32, modules in their own type; moments are float64.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from fuser.calibration import inverse_factor
from fuser.errors import UnsupportedOperator, UsageError
from fuser.evaluation import evaluate
from fuser.formats import Format
from fuser.graph import Graph, Node, Value
from fuser.padded import prompt
from fuser.runtime.executor import device_of
from fuser.tensors import tensor_of

LENGTH = 512  # tokens of a window, where a text is cut into such


class Moments:
    """What inputs of products are like: their second moment [K, K], and the factor of its inverse that GPTQ takes."""

    def __init__(self, K: int, device: torch.device) -> None:
        self.sum = torch.zeros(K, K, dtype=torch.float64, device=device)
        self._magnitudes = torch.zeros(K, dtype=torch.float64, device=device)
        self._tokens = 0
        self._factor: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Inputs [.., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.sum += rows.T @ rows
        self._magnitudes += rows.abs().sum(0)
        self._tokens += len(rows)

    @property
    def factor(self) -> Tensor:
        if self._factor is None:
            self._factor = inverse_factor(self.sum)
        return self._factor

    @property
    def importance(self) -> Tensor:
        """Of each input [K]: its mean square, but for a number that all have."""
        return self.sum.diagonal().float()

    @property
    def magnitude(self) -> Tensor:
        """Of each input [K]: the mean of its absolute value."""
        return (self._magnitudes / max(self._tokens, 1)).float()

    def within(self, format: Format) -> Tensor:
        """The second moments of the inputs of each group [groups, group, group]; of groups of whole rows, `importance`."""
        K, group = len(self.sum), format.grouped(len(self.sum))
        if format.group is None:
            return self.importance
        padded = torch.nn.functional.pad(self.sum, (0, -K % group, 0, -K % group))
        return padded.view(-1, group, len(padded) // group, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).float()


class Walk:
    """A graph that is computed on windows of tokens, as far as is asked for, while its weights are being replaced."""

    def __init__(self, graph: Graph, windows: Sequence[Tensor], device: torch.device | None = None) -> None:
        """
        Args:
            windows: of token ids [S].
            device: where it is computed; by default where the weights are.

        Raises:
            UnsupportedOperator: the graph has an input whose purpose is not known.
        """
        self._order = list(graph.nodes)
        self._number = {node: i for i, node in enumerate(self._order)}
        self._opset, self._device = graph.opset, device or device_of(graph)
        self._next = 0
        given = [prompt(graph, window) for window in windows]
        self._held = [{value: self._placed(x) for value, x in inputs.items()} for inputs in given]
        self._symbols = [_sizes(inputs) for inputs in given]
        self._last: tuple[Value | None, Moments | None] = None, None

    def moments(self, node: Node) -> Moments:
        """Of a product's inputs; products are asked for in order."""
        x = node.inputs[0]
        if x is None or x.shape is None or not isinstance(x.shape[-1], int):
            raise UnsupportedOperator(f"no calibration: what '{node.output.name}' multiplies has no fixed width")
        before, found = self._last
        if x is not before or found is None:
            made: Moments | None = None
            for held in self._computed(self._number[node]):
                if made is None:
                    made = Moments(x.shape[-1], held[x].device)
                made.add(held[x])
            assert made is not None
            self._last = x, found = x, made
        return found

    @torch.no_grad()
    def _computed(self, stop: int) -> Iterator[dict[Value, Tensor]]:
        """What is held of each window before the node at `stop`."""
        constants: dict[Value, Tensor] = {}
        nodes = self._order[self._next : stop]
        self._next = max(stop, self._next)
        for held, symbols in zip(self._held, self._symbols, strict=True):
            for node in nodes:
                given = [None if v is None else self._found(v, held, constants, symbols) for v in node.inputs]
                made = self._evaluated(node, given, symbols)
                held |= {
                    value: x for value, x in zip(node.outputs, made, strict=True)
                    if x is not None and self._read(value) > self._number[node]
                }  # fmt: skip
                for value in node.inputs:
                    if value in held and self._read(value) <= self._number[node]:
                        del held[value]
            yield held

    def _evaluated(
        self, node: Node, given: list[Tensor | None], symbols: dict[sympy.Symbol, int]
    ) -> list[Tensor | None]:
        return evaluate(node, given, symbols, opset=self._opset, float_dtype=torch.float32)

    def _read(self, value: Value) -> int:
        """The number of the last node that reads it; through nodes that have come since, which have none."""
        found = [
            self._number[user] if user in self._number else max(self._read(made) for made in user.outputs)
            for user in value.consumers
        ]
        return max(found, default=-1)

    def _found(
        self, value: Value, held: dict[Value, Tensor], constants: dict[Value, Tensor], symbols: dict[sympy.Symbol, int]
    ) -> Tensor:
        if value in held:
            return held[value]
        if value.constant is not None:
            if value not in constants:
                constants[value] = self._placed(tensor_of(value.constant))
            return constants[value]
        node = value.producer
        assert node is not None and node not in self._number
        given = [None if v is None else self._found(v, held, constants, symbols) for v in node.inputs]
        made = self._evaluated(node, given, symbols)[value.index]
        assert made is not None
        return made

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self._device, torch.float32 if x.is_floating_point() else None)


def _sizes(inputs: dict[Value, Tensor]) -> dict[sympy.Symbol, int]:
    """The sizes of the dims that a graph's inputs name."""
    return {
        dim: size
        for value, x in inputs.items()
        for dim, size in zip(value.shape or (), x.shape, strict=True)
        if isinstance(dim, sympy.Symbol)
    }


@dataclass(frozen=True, eq=False)
class Given:
    """What linears of a layer are given, the same tensor; maker: the module that made it; None: it is computed otherwise."""

    moments: Moments
    readers: list[nn.Module]
    maker: nn.Module | None


class LayerWalk:
    """A module whose layers are computed on windows of tokens, one after another, while their linears are being replaced."""

    def __init__(self, module: nn.Module, windows: Sequence[Tensor]) -> None:
        """
        Args:
            module: left in evaluation mode.
            windows: of token ids [S].

        Raises:
            UsageError: it has no list of layers of which each takes what the one before it made, as its first argument.
        """
        self._module, self._windows = module.eval(), windows
        stacks = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
        if not stacks:
            raise UsageError("no calibration: the module has no list of layers")
        self._stack = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
        self._layers = [*stacks[self._stack]]
        self._current = 0
        given = [self._given(window) for window in windows]
        self._hidden = [hidden for hidden, _ in given]
        self._beside = [beside for _, beside in given]
        self._shared: dict[nn.Module, Moments] = {}

    def _given(self, window: Tensor) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """What the first layer is given, and what each is given beside it."""
        first: list[Tensor] = []
        beside: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        made: list[Tensor] = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = len(beside)
            if number == len(self._layers) or layer is not self._layers[number] or not args or (
                made and args[0] is not made[-1]
            ):  # fmt: skip
                raise UsageError(f"no calibration: the layers of '{self._stack}' are not computed one after another")
            first.extend(args[:1] if not first else ())
            beside.append((args[1:], kwargs))

        def after(layer: nn.Module, args: Any, found: Any) -> None:
            made[:] = [_hidden(found)]

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        hooks += [layer.register_forward_hook(after) for layer in self._layers]
        try:
            self._whole(window)
        finally:
            for hook in hooks:
                hook.remove()
        if len(beside) < len(self._layers):
            raise UsageError(f"no calibration: the layers of '{self._stack}' are not computed one after another")
        return first[0], beside

    def moments(self, path: str) -> Moments:
        """Of a linear's inputs; linears are asked for layer by layer."""
        part = self._module.get_submodule(path)
        is_inside = self.enter(path)
        if part not in self._shared:
            self._shared = self._gathered(part, is_inside=is_inside)
        return self._shared[part]

    def enter(self, path: str) -> bool:
        """Goes on to the layer that holds a module; whether there is one."""
        if not path.startswith(f"{self._stack}."):
            return False
        while self._current < int(path.removeprefix(f"{self._stack}.").split(".")[0]):
            self._hidden = [self._layer(i) for i in range(len(self._windows))]
            self._current += 1
            self._shared = {}
        return True

    @property
    def layer(self) -> nn.Module:
        """The one that comes next."""
        found: nn.Module = self._layers[self._current]
        return found

    def output(self) -> Tensor:
        """What the layer makes of the first window."""
        return self._layer(0)

    def inputs(self) -> list[Given]:
        """Of the layer's linears, in the order in which they are computed; those of one input together."""
        found: dict[nn.Module, Given] = {}
        given: list[tuple[Tensor, Given]] = []  # of one window; held, so that no other tensor takes their place
        made: list[tuple[Tensor, nn.Module]] = []

        def before(part: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            one = next((one for held, one in given if held is x), None)
            if one is None:
                maker = next((maker for held, maker in made if held is x), None)
                one = found.get(part) or Given(Moments(x.shape[-1], x.device), [], maker)
                one.moments.add(x)
                given.append((x, one))
            if part not in found:
                found[part] = one
                one.readers.append(part)

        def after(part: nn.Module, args: Any, output: Any) -> None:
            made.append((output, part))

        leaves = [part for part in self.layer.modules() if not [*part.children()]]
        hooks = [part.register_forward_pre_hook(before) for part in leaves if matrix(part) is not None]
        hooks += [part.register_forward_hook(after) for part in leaves]
        try:
            for i in range(len(self._windows)):
                given.clear()
                made.clear()
                self._layer(i)
        finally:
            for hook in hooks:
                hook.remove()
        return list(dict.fromkeys(found.values()))

    def _gathered(self, part: nn.Module, *, is_inside: bool) -> dict[nn.Module, Moments]:
        """The moments of a linear's inputs, and the others that were given the very same."""
        found: list[Moments] = []
        given: list[Tensor] = []
        same: set[nn.Module] = set()

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is part:
                given[:] = args[:1]
                if not found:
                    found.append(Moments(given[0].shape[-1], given[0].device))
                found[0].add(given[0])
            elif given and args and args[0] is given[0]:
                same.add(module)

        around = self._layers[self._current] if is_inside else self._module
        hooks = [leaf.register_forward_pre_hook(before) for leaf in around.modules() if not [*leaf.children()]]
        try:
            for i, window in enumerate(self._windows):
                given.clear()
                self._layer(i) if is_inside else self._whole(window)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            raise UsageError("no calibration: a linear is not used for the tokens that were given")
        return dict.fromkeys([part, *same], found[0])

    @torch.no_grad()
    def _whole(self, window: Tensor) -> None:
        quiet = {"use_cache": False} if "use_cache" in inspect.signature(self._module.forward).parameters else {}
        try:
            self._module(window[None].to(next(self._module.parameters()).device), **quiet)
        except IndexError:
            raise UsageError("no calibration: the module has no such token or position") from None

    @torch.no_grad()
    def _layer(self, window: int) -> Tensor:
        args, kwargs = self._beside[window][self._current]
        return _hidden(self.layer(self._hidden[window], *args, **kwargs))


def matrix(part: nn.Module) -> Tensor | None:
    """The weight [N, K] of a linear; None of other modules."""
    if isinstance(part, nn.Linear):
        return part.weight
    weight = getattr(part, "weight", None)
    is_conv = type(part).__name__ == "Conv1D" and isinstance(getattr(part, "nf", None), int)  # of transformers: [K, N]
    return weight.T if is_conv and isinstance(weight, Tensor) else None


def _hidden(made: Any) -> Tensor:
    """The hidden states of what a layer gives."""
    found: Tensor = made[0] if isinstance(made, (tuple, list)) else made
    return found


def windows_of(calibration: Any, tokenizer: Any = None, length: int = LENGTH) -> tuple[Tensor, ...]:
    """Windows of token ids [S] to calibrate with: of a text, of ids one after another, or such windows themselves.

    Raises:
        UsageError: it holds no ids, or is a text without a tokenizer.
    """
    if isinstance(calibration, str):
        if tokenizer is None:
            raise UsageError("calibration with a text needs a tokenizer: give one, or token ids")
        calibration = tokenizer.encode(calibration)
    try:
        rows = [torch.as_tensor(row) for row in calibration]
        flat = torch.stack(rows) if rows and not rows[0].dim() else None
    except (TypeError, ValueError, RuntimeError):
        raise UsageError("calibration takes a text, token ids, or windows of token ids") from None
    windows = [*torch.split(flat, length)] if flat is not None else rows
    if not windows or any(row.dim() != 1 or not len(row) or row.is_floating_point() for row in windows):
        raise UsageError("calibration takes a text, token ids, or windows of token ids")
    return tuple(row.long() for row in windows)

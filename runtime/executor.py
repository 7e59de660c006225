"""Runs a graph with torch, on CPU or CUDA: canonical, fused, or as it was imported."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import sympy
import torch
from torch import Tensor

from fuser import dims
from fuser.constants import Constant
from fuser.errors import FuserError, InputError, UnsupportedOperator
from fuser.graph import Graph, Node, Value
from fuser.operators.table import MISFITS
from fuser.runtime.program import Kernel, check_operators, label, write
from fuser.runtime.sizes import expression
from fuser.shapes import infer
from fuser.tensors import Held, tensor_of

CACHED = 8  # combinations of input shapes whose dims, positions and masks are kept

Shapes = tuple[torch.Size, ...]


class Executor:
    """A graph as one Python function: `executor(*inputs)` gives its outputs.

    Weights of a module are used as they are and stored ones are loaded once; a transposed weight is a view, and weights
    joined from parts (packed projections) are concatenated once, which takes the parts' memory again.
    """

    source: str
    """The text of the functions that were generated."""

    def __init__(
        self,
        graph: Graph,
        *,
        device: torch.device | str | None = None,
        kernels: Mapping[str, Kernel] | None = None,
    ) -> None:
        """
        Args:
            graph: left as it is.
            device: where weights are moved, and inputs when they are given; by default where a module's weights are,
                else the CPU.
            kernels: what computes a fused operator, by its name, in place of its reference function.

        Raises:
            UnsupportedOperator: a node is outside the table, or has a body.
            InputError: a weight has no elements, or cannot be read.
        """
        check_operators(graph)
        graph = graph.clone()
        infer(graph)
        self.inputs = graph.inputs
        self.device = torch.device(device) if device is not None else device_of(graph)
        self._graph = graph  # keeps constants alive, by whose identity tensors are shared
        self._loaded: dict[Any, Tensor] = {}
        self._leaves: dict[int, Tensor] = {}
        self._program = write(graph, kernels or {}, self._load, self.device)
        self._loaded.clear()
        self._leaves.clear()
        self.source = self._program.text
        self._file = f"<executor {id(self)}>"
        exec(compile(self.source, self._file, "exec"), self._program.names)
        self._run: Callable[..., list[Tensor]] = self._program.names["run"]
        self._dtypes = tuple(None if value.dtype is None else _torch_dtype(value) for value in self.inputs)
        self._cache: OrderedDict[Shapes, tuple[Any, ...]] = OrderedDict()
        self._declared = self._as_declared()
        made = self._guarded("fixed")
        self._program.names.update(zip(self._program.fixed, made, strict=True))

    def _load(self, constant: Constant) -> Tensor:
        key = constant.key
        if key not in self._loaded:
            self._loaded[key] = tensor_of(constant, self._leaf).to(self.device)
        return self._loaded[key]

    def _leaf(self, constant: Constant) -> Tensor:
        if id(constant) not in self._leaves:
            if not constant.is_known:
                raise InputError("a weight has no elements: the model was read without its weights")
            self._leaves[id(constant)] = tensor_of(constant).to(self.device)
        return self._leaves[id(constant)]

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The graph's outputs, in order; what an input is given is never written to.

        Raises:
            InputError: an input of another type, rank or size than the graph declares.
            FuserError: a node cannot compute with what it is given (an index out of range, say).
        """
        shapes = tuple([x.shape for x in inputs]) if all(isinstance(x, Tensor) for x in inputs) else None
        if (
            shapes is None
            or len(inputs) != len(self.inputs)
            or any(dtype is not None and x.dtype is not dtype for x, dtype in zip(inputs, self._dtypes, strict=True))
        ):
            raise self._misfit(inputs)
        sized = self._cache.get(shapes)
        if sized is None:
            sizes = self._declared(shapes) if self._declared is not None else None
            sized = self._guarded("sized", *(self._sizes(shapes) if sizes is None else sizes))
            self._cache[shapes] = sized
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(shapes)
        placed = [x if x.device == self.device else x.to(self.device) for x in inputs]
        try:
            return self._run(*placed, sized)
        except (*MISFITS, FuserError) as error:
            raise self._explained(error) from error

    @torch.no_grad()
    def _guarded(self, function: str, *sizes: int) -> tuple[Any, ...]:
        """What `fixed` or `sized` gives; what these make of nothing is made on the device."""
        try:
            with torch.device(self.device):
                found: tuple[Any, ...] = self._program.names[function](*sizes)
                return found
        except (*MISFITS, FuserError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        """The error, told by the node it came from."""
        if isinstance(error, torch.OutOfMemoryError):
            return error
        node = self._node_at(error.__traceback__)
        where = "an output" if node is None else label(node)
        kind = type(error) if isinstance(error, UnsupportedOperator) else FuserError
        return kind(f"{where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

    def _node_at(self, traceback: TracebackType | None) -> Node | None:
        found = None
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == self._file:
                found = self._program.nodes.get(traceback.tb_lineno, found)
            traceback = traceback.tb_next
        return found

    def _misfit(self, inputs: Sequence[Any]) -> InputError:
        """What is wrong with the number of inputs, or with one's type."""
        names = ", ".join(f"'{value.name}'" for value in self.inputs)
        if len(inputs) != len(self.inputs):
            return InputError(f"{len(self.inputs)} inputs are wanted ({names}), {len(inputs)} were given")
        for value, dtype, x in zip(self.inputs, self._dtypes, inputs, strict=True):
            if not isinstance(x, Tensor):
                return InputError(f"input '{value.name}' must be a torch tensor, got {type(x).__name__}")
            if dtype is not None and x.dtype is not dtype:
                return InputError(
                    f"input '{value.name}' must be {value.dtype}, got {str(x.dtype).removeprefix('torch.')}"
                )
        raise AssertionError("nothing is wrong")

    def _as_declared(self) -> Callable[[Shapes], tuple[int, ...] | None] | None:
        """A function that reads the sizes of the symbols where the shapes are as declared, and gives None where not.

        None where an input's rank is open, or a dim is computed from a size that no input has.
        """
        places: dict[sympy.Symbol, str] = {}
        for index, value in enumerate(self.inputs):
            for axis, dim in enumerate(value.shape or ()):
                if not isinstance(dim, int) and dim.is_Symbol:
                    places.setdefault(dim, f"shapes[{index}][{axis}]")
        declared = [value.shape for value in self.inputs]
        if any(shape is None or dims.symbols(shape) - places.keys() for shape in declared):
            return None
        names = {symbol: f"s{number}" for number, symbol in enumerate(places)}
        lines = [f"    {names[symbol]} = {place}" for symbol, place in places.items()]
        shapes = ["".join(f"{expression(dim, names.__getitem__)}, " for dim in shape or ()) for shape in declared]
        sizes = "".join(f"{names[symbol]}, " for symbol in self._program.symbols)
        wanted = "".join(f"({shape}), " for shape in shapes)
        text = "\n".join(
            ["def declared(shapes):", "    if RANKS != tuple(map(len, shapes)):", "        return None", *lines,
             f"    return ({sizes}) if shapes == ({wanted}) else None"]
        )  # fmt: skip
        scope: dict[str, Any] = {"RANKS": tuple(len(shape or ()) for shape in declared)}
        exec(text, scope)
        found: Callable[[Shapes], tuple[int, ...] | None] = scope["declared"]
        return found

    def _sizes(self, shapes: Shapes) -> list[int]:
        """The sizes of the symbols; InputError where the shapes are not those that are declared."""
        found: dict[sympy.Symbol, tuple[int, Value]] = {}
        for symbolic in (False, True):  # dims that are computed from others come last
            for value, shape in zip(self.inputs, shapes, strict=True):
                if value.shape is None:
                    continue
                if len(shape) != len(value.shape):
                    raise InputError(f"input '{value.name}' must be {dims.text(value.shape)}, got {list(shape)}")
                for axis, (dim, size) in enumerate(zip(value.shape, shape, strict=True)):
                    is_plain = isinstance(dim, int) or dim.is_Symbol
                    if is_plain is symbolic:
                        continue
                    wanted, told = self._wanted(dim, size, value, found)
                    if wanted != size:
                        raise InputError(
                            f"input '{value.name}' must be {dims.text(value.shape)}: its axis {axis} must be {wanted}{told}, "
                            f"got {list(shape)}"
                        )
        return [found[symbol][0] for symbol in self._program.symbols]

    def _wanted(
        self, dim: dims.Dim, size: int, value: Value, found: dict[sympy.Symbol, tuple[int, Value]]
    ) -> tuple[int, str]:
        """The size a dim must be, and why."""
        if isinstance(dim, int):
            return dim, ""
        if dim.is_Symbol:
            wanted, first = found.setdefault(dim, (size, value))
            return wanted, f" as '{dim}' is in '{first.name}'"
        told = dims.substitute(dim, {symbol: size for symbol, (size, _) in found.items()})
        return (told if isinstance(told, int) else size), f" ({dim})"


def _torch_dtype(value: Value) -> torch.dtype:
    assert value.dtype is not None
    try:
        return value.dtype.torch
    except AttributeError:
        raise UnsupportedOperator(f"input '{value.name}' is {value.dtype}, which torch has no tensors of") from None


def device_of(graph: Graph) -> torch.device:
    """Where the weights of a module are."""
    for value in graph.constants():
        for leaf in value.constant.leaves() if value.constant is not None else ():
            if isinstance(leaf, Held) and leaf.is_known:
                return leaf.tensor.device
    return torch.device("cpu")

"""Runs the programs that codegen composes: weights made once, paged caches, kernels and torch's products in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from sys import maxsize
from typing import Any, Literal

import sympy
import torch
from torch import Tensor

from fuser.codegen import cache
from fuser.codegen.arrangement import Arrangement, Tokens, arrangement
from fuser.codegen.compose import compose
from fuser.codegen.compose_linear import quantized_parts
from fuser.codegen.embedding import Embedding
from fuser.codegen.kv_groups import group_of
from fuser.codegen.program import INPUTS, Argument, Cached, Input, Part, Program, Rows, Scratch, State, Step, Weight
from fuser.codegen.quantized import sides_of
from fuser.codegen.tuning import table_of
from fuser.constants import Constant, Joined, Transposed
from fuser.dtypes import DType
from fuser.errors import UsageError
from fuser.evaluation import evaluate
from fuser.graph import Graph, Node, Value
from fuser.patterns.rotary_table import rotary_table
from fuser.quantized import Codes, Quantized
from fuser.runtime.packing import packed
from fuser.runtime.paging import Group
from fuser.step_reference import reference
from fuser.tensors import tensor_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Weights:
    """The tensors of programs on one device, each made when it is first asked for and shared by all programs."""

    def __init__(self, device: torch.device, dtype: str, positions: int) -> None:
        """`positions`: how many rows tables of rotary embedding have."""
        self.device, self.dtype, self.positions = device, DTYPES[dtype], positions
        self.made: dict[Any, Tensor] = {}
        self._scratch: Tensor | None = None

    def __getitem__(self, weight: Weight) -> Tensor:
        if weight.key not in self.made:
            self.made[weight.key] = self._make(weight).contiguous()
        return self.made[weight.key]

    def _wide(self, constant: Constant) -> Tensor:
        return tensor_of(constant).to(self.device, torch.float32)

    def scratch(self, N: int, K: int) -> Tensor:
        """Memory for a matrix [N, K] that is made on the way, one for all."""
        if self._scratch is None or self._scratch.numel() < N * K:
            self._scratch = torch.empty(N * K, dtype=self.dtype, device=self.device)
        return self._scratch[: N * K].view(N, K)

    def reserve(self, elements: int) -> None:
        """Makes that memory as large as the largest will be, once."""
        self.scratch(elements, 1)

    def _packed(self, weight: Weight) -> Tensor:
        """The words of a quantized weight; its scales and zeros are made with them."""
        assert weight.base is not None and weight.product is not None
        held = [part.tensors() for part in quantized_parts(weight.base)]
        tensors = [
            [x for x in parts if x is not None]
            for parts in zip(*((c.packed, c.scales, c.zeros) for c in held), strict=True)
        ]
        codes, scales, zeros = (torch.cat(parts).to(self.device) if parts else None for parts in tensors)
        assert codes is not None and scales is not None
        sides = torch.tensor(sides_of(weight.product), device=self.device)
        whole = Codes(codes, scales, zeros, held[0].format, held[0].width)
        for kind, made in zip(("codes", "scales", "zeros"), packed(whole, sides, self.dtype), strict=True):
            if made is not None:
                self.made[replace(weight, kind=kind).key] = made  # type: ignore[arg-type]
        return self.made[weight.key]

    def _make(self, weight: Weight) -> Tensor:
        base = weight.base
        if weight.kind in ("codes", "scales", "zeros"):
            return self._packed(weight)
        if weight.kind in ("eights", "row_scales"):
            assert base is not None
            held = [part.tensors() for part in quantized_parts(base)]
            if weight.kind == "row_scales":
                return torch.cat([codes.scales[:, 0] for codes in held]).to(self.device, torch.float32)
            return torch.cat([codes.numbers for codes in held]).to(self.device)
        if weight.kind == "column_sums":
            return self._make(Weight("linear", base, weight.scale)).float().sum(1)
        if weight.kind == "bias":
            assert base is not None or weight.linear is not None
            total = self._wide(base) if base is not None else torch.zeros((), device=self.device)
            if weight.shift is not None and weight.linear is not None:
                total = total + self._wide(weight.shift) @ self._wide(weight.linear)
            return total.to(self.dtype)
        assert base is not None
        if weight.kind == "linear":
            parts = base.parts if isinstance(base, Joined) else (base,)
            scale = None if weight.scale is None else self._wide(weight.scale)
            return torch.cat([self._linear(part, scale) for part in parts])
        if weight.kind in ("cos", "sin"):
            places = torch.arange(weight.start, weight.start + self.positions)
            tables: tuple[Tensor, Tensor] = rotary_table.reference(
                places, tensor_of(base).double(), scale=weight.factor
            )
            return tables[weight.kind == "sin"].to(self.device, torch.float32)
        found = tensor_of(base).to(self.device, self.dtype)
        return found[weight.start :].reshape(found.shape[0] - weight.start, -1) if weight.kind == "table" else found

    def _linear(self, base: Constant, scale: Tensor | None) -> Tensor:
        quantized = base.base if isinstance(base, Transposed) and isinstance(base.base, Quantized) else None
        if quantized is not None:
            held = quantized.tensors()
            zeros = None if held.zeros is None else held.zeros.to(self.device)
            codes = Codes(held.packed.to(self.device), held.scales.to(self.device), zeros, held.format, held.width)
            return (codes.weight if scale is None else codes.weight * scale).to(self.dtype)
        stored = tensor_of(base).T.to(self.device)
        return (stored if scale is None else stored.float() * scale).to(self.dtype)


class Stepper:
    """Steps of a fused decoder over paged caches, on one device.

    A step takes the new tokens of any sequences, as codegen's Program says, and gives the graph's outputs, a row for each of
    them, or for each that is chosen.
    """

    def __init__(
        self, graph: Graph, *, dtype: str, device: torch.device | str, pages: int | None = None, page: int = 16,
        positions: int = 4096, kernels: Literal["triton", "reference"] = "triton", kv_group: int = 0,
    ) -> None:  # fmt: skip
        """
        Args:
            graph: fused; left as it is.
            dtype: bf16, fp16 or fp32, of weights, activations and caches.
            pages: of the cache, of `page` tokens each, one block table for all layers; by default `allocate` makes them.
            positions: the longest sequence.
            kernels: emitted ones, or what they compute by torch.
            kv_group: channels of a head that have a scale between them in a cache of int8; 0: the cache is of `dtype`.
        """
        self.graph, self.dtype, self.page, self.kernels = graph, dtype, page, kernels
        self.kv_group = kv_group
        self.device = torch.device(device)
        self.weights = Weights(self.device, dtype, positions)
        self.caches: dict[tuple[str, str], dict[str, Tensor]] = {}
        self.groups: dict[tuple[str, str], int] = {}
        self.table = table_of(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        self._programs: dict[tuple[int, bool, int | None], Program] = {}
        self._bound: dict[tuple[int, bool, int | None], Bound] = {}
        if pages is not None:
            self.allocate(pages, [Group(None, tuple(range(len(self.states))))])

    def program(self, tokens: int, *, decode: bool, rows: int | None = None) -> Program:
        """The program for at most `tokens` tokens, of at most `rows` of which outputs are made; each is composed once.

        Raises:
            UnsupportedOperator: the graph is not token-wise.
        """
        key = tokens, decode, rows
        if key not in self._programs:
            self._programs[key] = compose(
                self.graph, dtype=self.dtype, tokens=tokens, page=self.page, decode=decode, table=self.table, rows=rows,
                kv_group=self.kv_group, codes=self.kernels == "triton",
            )  # fmt: skip
        return self._programs[key]

    @property
    def _first(self) -> Program:
        return self.program(1, decode=self.kernels == "triton")

    @property
    def states(self) -> list[State]:
        """The keys and values of every layer."""
        return self._first.states

    @property
    def most_positions(self) -> int:
        """The longest sequence that the graph has embeddings for, if it has such of positions."""
        positions = Input("positions")
        tables = [
            s.what.rows[0] for s in self._first.steps if isinstance(s.what, Embedding) and positions in s.arguments
        ]
        return min(tables, default=maxsize)

    def load(self, note: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Places every weight on the device, one after another; `note` is told how many of them are there."""
        wanted = {a.key: a for step in self._first.steps for a in step.arguments if isinstance(a, Weight)}
        for done, weight in enumerate(wanted.values()):
            self.weights[weight]
            note(done + 1, len(wanted))

    def page_bytes(self, groups: Sequence[Group]) -> int:
        """Bytes of one page."""
        return sum(self.page * self.token_bytes(states[0]) for states in self._slots(groups).values())

    def token_bytes(self, state: State) -> int:
        """Bytes of a token's keys and values in one layer, with their scales."""
        made = self._pages(state, 1, torch.device("meta"))
        return sum(tensor.nbytes for tensor in made.values()) // self.page

    def _pages(self, state: State, pages: int, device: torch.device) -> dict[str, Tensor]:
        """A layer's keys and values, zeros, and scales where they are int8."""
        shape = (pages, self.page, state.kv_heads, state.head_dim)
        dtype = torch.int8 if self.kv_group else DTYPES[self.dtype]
        made = {which: torch.zeros(shape, dtype=dtype, device=device) for which in "kv"}
        if self.kv_group:
            groups = state.head_dim // group_of(self.kv_group, state.head_dim)
            scales = (pages, state.kv_heads, groups, self.page)
            made |= {f"{which}_scale": torch.zeros(scales, dtype=torch.float16, device=device) for which in "kv"}
        return made

    def _slots(self, groups: Sequence[Group]) -> dict[tuple[int, int, int], list[State]]:
        """The states that have one tensor between them: at most one of a group."""
        found: dict[tuple[int, int, int], list[State]] = {}
        for group in groups:
            for place, layer in enumerate(group.layers):
                state = self.states[layer]
                found.setdefault((place, state.kv_heads, state.head_dim), []).append(state)
        return found

    def allocate(self, pages: int, groups: Sequence[Group]) -> None:
        """Makes the caches, zeros. Layers of one group have one block table, layers of different ones share tensors.

        Raises:
            UsageError: the graph has no embedding of as many positions as the stepper is for.
        """
        if self.most_positions < self.weights.positions:
            raise UsageError(
                f"step: the graph has embeddings of {self.most_positions} positions, not {self.weights.positions}"
            )
        for i, group in enumerate(groups):
            self.groups |= {self.states[layer].past: i for layer in group.layers}
        for states in self._slots(groups).values():
            made = self._pages(states[0], pages, self.device)
            self.caches |= {state.past: made for state in states}

    def bound(self, tokens: int, *, decode: bool, rows: int | None = None) -> "Bound":
        """The program, as of `program`, with its memory and the caches."""
        key = tokens, decode, rows
        if key not in self._bound:
            program = self.program(tokens, decode=decode, rows=rows)
            self._bound[key] = Bound(program, self.weights, self.caches, self.groups, self.kernels)
        return self._bound[key]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copies whole pages of every layer; all are read before any is written."""
        for tensor in {id(x): x for made in self.caches.values() for x in made.values()}.values():
            tensor[targets] = tensor[sources]


class Bound:
    """A program with the memory of its rows: calling it launches every step, on the current stream."""

    def __init__(
        self, program: Program, weights: Weights, caches: dict[tuple[str, str], dict[str, Tensor]],
        groups: dict[tuple[str, str], int], kernels: str = "triton",
    ) -> None:  # fmt: skip
        self.program, self.weights, self.caches, self.groups, self.kernels = program, weights, caches, groups, kernels
        device, dtype = weights.device, DTYPES[program.dtype]
        rows = [a.rows if isinstance(a, Part) else a for step in program.steps for a in step.arguments]
        made = {r.place: r for r in rows if isinstance(r, Rows)}
        self.memory = {
            place: torch.empty(
                (program.rows or 0 if r.selected else program.tokens, r.width),
                dtype=EIGHT_BITS.get(r.dtype, torch.float32) if r.dtype else dtype,
                device=device,
            )
            for place, r in made.items()
        }
        used = [(step.kernel, program.tokens if step.by_sequence else 1) for step in program.steps if step.kernel]
        floats = max((kernel.workspace[0] * count for kernel, count in used), default=0)
        counters = max((kernel.workspace[1] * count for kernel, count in used), default=0)
        self.workspace = (
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )
        weights.reserve(program.scratch)
        self.launches = [self._launch(step) for step in program.steps]

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """The program's outputs, by name, for its inputs: int32 tensors on the device, and `longest`, a number.

        slot_mapping and block_table have one dim more than the program says, in front: of the groups of layers.
        Positions are less than the stepper's, slots and pages are the cache's: what tensors hold is not looked at here.

        Raises:
            UsageError: an input is missing, or of another shape or type; more tokens than the program is for.
        """
        self._checked(inputs)
        return self.run(inputs)

    def run(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The same, of inputs that are right."""
        for launch in self.launches:
            launch(inputs)
        return {name: self._rows(place, inputs) for name, place in self.program.outputs.items()}

    def _checked(self, inputs: Mapping[str, Any]) -> None:
        """Whether inputs fit one another and the program."""
        decode = self.program.decode
        left = {"longest", *["query_starts"] * decode, *["logit_rows"] * (self.program.rows is None)}
        names = [name for name in INPUTS if name not in left]
        for name in names:
            given = inputs.get(name)
            if not isinstance(given, Tensor) or given.dtype is not torch.int32 or not given.is_contiguous():
                raise UsageError(
                    f"step: {name} must be a contiguous int32 tensor, got {getattr(given, 'dtype', given)}"
                )
        n: int = inputs["tokens"].numel()
        sequences = inputs["context_lens"].numel()
        if not 1 <= n <= self.program.tokens:
            raise UsageError(f"step: this program takes 1 to {self.program.tokens} tokens, not {n}")
        if decode and sequences != n:
            raise UsageError(
                f"step: in decode each sequence has one new token, got {n} tokens of {sequences} sequences"
            )
        if not decode and not isinstance(inputs.get("longest"), int):
            raise UsageError(f"step: longest must be a number, got {inputs.get('longest')}")
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(names, (n,))
        wanted |= {"context_lens": (sequences,), "query_starts": (sequences + 1,)}
        groups = max(self.groups.values(), default=0) + 1
        wanted["slot_mapping"] = groups, n
        wanted["block_table"] = groups, sequences, inputs["block_table"].shape[-1:].numel()
        if self.program.rows is not None:
            chosen = inputs["logit_rows"].numel()
            wanted["logit_rows"] = (chosen,)
            if not 1 <= chosen <= self.program.rows:
                raise UsageError(f"step: this program gives outputs of 1 to {self.program.rows} rows, not of {chosen}")
        for name in names:
            if inputs[name].shape != wanted[name]:
                raise UsageError(f"step: {name} must be {[*wanted[name]]}, got {[*inputs[name].shape]}")

    def _rows(self, place: Rows | Part, inputs: Mapping[str, Any]) -> Tensor:
        rows = place.rows if isinstance(place, Part) else place
        memory = self.memory[rows.place][: len(inputs["logit_rows" if rows.selected else "tokens"])]
        return memory[:, place.start : place.stop] if isinstance(place, Part) else memory

    def _reader(self, argument: Argument) -> Callable[[dict[str, Any]], Any]:
        """How an argument's tensor is found, at a step."""
        if isinstance(argument, (Rows, Part)):
            return lambda inputs: self._rows(argument, inputs)
        if isinstance(argument, Input):
            if argument.state is None:
                return lambda inputs: inputs[argument.name]
            group = self.groups[argument.state.past]
            return lambda inputs: inputs[argument.name][group]
        if isinstance(argument, Scratch):
            return lambda inputs: self.weights.scratch(argument.N, argument.K)
        held = (
            self.caches[argument.state.past][argument.which] if isinstance(argument, Cached) else self.weights[argument]
        )
        return lambda inputs: held

    def _launch(self, step: Step) -> Callable[[dict[str, Any]], None]:
        readers = [self._reader(argument) for argument in step.arguments]
        run = self._kernel(step) if step.kernel is not None else self._product(step) if step.kind == "product" else None
        if run is None:
            run = self._evaluated(step.nodes[0])
        return lambda inputs: run([read(inputs) for read in readers])

    def _kernel(self, step: Step) -> Callable[[list[Any]], None]:
        assert step.kernel is not None
        if self.kernels == "reference":
            compute = reference(step.what)
            return lambda arguments: compute(*arguments)
        launch = cache.load(step.kernel).launch
        scratch = self.workspace if step.kernel.workspace[0] else ()
        return lambda arguments: launch(*arguments, *scratch)

    def _product(self, step: Step) -> Callable[[list[Any]], None]:
        names = step.what

        def run(arguments: list[Any]) -> None:
            given = dict(zip(names, arguments, strict=True))
            added = [given[name] for name in ("bias", "residual") if name in given]
            if added:
                torch.addmm(added[0], given["x"], given["weight"].T, out=given["y"])
            else:
                torch.mm(given["x"], given["weight"].T, out=given["y"])
            for more in added[1:]:
                given["y"].add_(more)

        return run

    def _evaluated(self, node: Node) -> Callable[[list[Any]], None]:
        """A node by its reference, on one sequence of all the rows."""
        dims, dtype = self.program.dims, DTYPES[self.program.dtype]
        known = {
            i: tensor_of(v.constant).to(
                self.weights.device, dtype if v.dtype is not None and v.dtype.is_float else None
            )
            for i, v in enumerate(node.inputs)
            if v is not None and v.constant is not None
        }

        def run(arguments: list[Any]) -> None:
            rows = iter(arguments)
            given = [
                known[i] if i in known else None if v is None else _as_graph(next(rows), v, dims)
                for i, v in enumerate(node.inputs)
            ]
            count = arguments[0].shape[0]
            symbols = {
                dim: size for dim, size in ((dims.batch, 1), (dims.sequence, count)) if isinstance(dim, sympy.Symbol)
            }
            found = evaluate(node, given, symbols, opset=23)
            for value, made, target in zip(node.outputs, found, rows, strict=True):
                assert made is not None
                target.copy_(_as_rows(made, value, dims))

        return run


def _arranged(value: Value, dims: Tokens) -> Arrangement:
    found = arrangement(value, dims)
    assert found is not None
    return found


def _as_graph(rows: Tensor, value: Value, dims: Tokens) -> Tensor:
    """Rows [n, width] as the value is for one sequence of n tokens."""
    found = _arranged(value, dims)
    return rows.reshape(rows.shape[0], *found.row).movedim(0, found.axis - 1).unsqueeze(0)


def _as_rows(made: Tensor, value: Value, dims: Tokens) -> Tensor:
    found = _arranged(value, dims)
    return made.squeeze(0).movedim(found.axis - 1, 0).flatten(1)


def dtype_of(graph: Graph) -> str:
    """The element type of a graph's floats, as kernels name it: of its widest weight."""
    floats = {v.dtype for v in graph.constants() if v.dtype is not None and v.dtype.is_float and v.rank == 2}
    return {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16"}.get(next(iter(floats), DType.FLOAT32), "fp32")

"""Steps of a decoder that is not token-wise, or has what no kernel computes: the graph itself, on padded batches.

Keys and values are gathered from their pages into the graph's past and, once it has run, what is new is written back. A graph
that takes no mask or no positions is run for one sequence at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fuser.codegen.step_inputs import inputs_of, shifted
from fuser.errors import UnsupportedOperator
from fuser.graph import FUSER, Graph, Value
from fuser.runtime.engine import Step
from fuser.runtime.executor import Executor
from fuser.runtime.torch_kernels import KERNELS


class PaddedRunner:
    """Steps by a graph of (tokens [B, S], perhaps mask [B, P + S], positions [B, S], past keys and values [B, G, P, Dh])."""

    looks_ahead = False

    def __init__(self, graph: Graph, *, device: torch.device | str, page: int) -> None:
        """
        Raises:
            UnsupportedOperator: the graph takes something else, or declares no state.
        """
        self.device, self.page = torch.device(device), page
        self.inputs = {value.name: value for value in graph.inputs}
        self.states = _states(graph)
        self.kinds = _kinds(graph, self.states)
        tokens = next((value for value in graph.inputs if self.kinds[value.name] == "tokens"), None)
        strange = next((name for name, kind in self.kinds.items() if not kind), None)
        if tokens is None:
            raise UnsupportedOperator("no generation: no input [batch, sequence] holds token ids")
        if not self.states or strange is not None:
            lacks = f"what input '{strange}' is for is not known" if strange else "no keys and values are kept"
            raise UnsupportedOperator(f"no generation: {lacks}")
        self.vocabulary = _rows(graph, tokens)
        self.is_batched = {"mask", "positions"} <= {*self.kinds.values()} and not isinstance(
            (tokens.shape or (1,))[0], int
        )
        self.executor = Executor(graph, device=self.device, kernels=KERNELS)
        self.outputs = [value.name for value in graph.outputs]
        widths = {
            v.name: v.shape[-1] for v in graph.outputs if v.shape and len(v.shape) == 3 and isinstance(v.shape[-1], int)
        }
        self.logits = max(widths, key=lambda name: int(widths[name]))
        self.caches: dict[str, Tensor] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every layer."""
        return sum(
            self._row(name)[0] * self._row(name)[1] * self._dtype(name).itemsize * self.page for name in self.states
        )

    def allocate(self, pages: int) -> None:
        """Makes the caches, zeros: [pages, page, G, Dh] of every state."""
        for name in self.states:
            shape = pages, self.page, *self._row(name)
            self.caches[name] = torch.zeros(shape, dtype=self._dtype(name), device=self.device)

    def _row(self, name: str) -> tuple[int, int]:
        shape = self.inputs[name].shape
        assert shape is not None
        return int(shape[1]), int(shape[3])

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.inputs[name].dtype
        assert dtype is not None
        return dtype.torch

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for cache in self.caches.values():
            cache[list(targets)] = cache[list(sources)]

    def choose(self, tokens: Tensor) -> None:
        """Tokens are read before the next step, which gives them."""

    def run(self, step: Step) -> tuple[Tensor, Tensor]:
        counts = (step.query_starts[1:] - step.query_starts[:-1]).tolist()
        everyone = list(range(len(counts)))
        parts = [everyone] if self.is_batched else [[row] for row in everyone]
        rows = torch.cat([self._part(step, part, counts) for part in parts])
        logits = rows[torch.from_numpy(step.logit_rows).to(self.device).long()]
        return logits, logits.argmax(-1).to(torch.int32)

    def _part(self, step: Step, part: list[int], counts: list[int]) -> Tensor:
        """Logits of all new tokens of some sequences, one after another."""
        starts = [int(step.context_lens[row]) - counts[row] for row in part]
        P, S = max(starts), max(counts[row] for row in part)
        given = [self._given(name, step, part, counts, starts, P, S) for name in self.inputs]
        made = dict(zip(self.outputs, self.executor(*given), strict=True))
        for i, row in enumerate(part):
            span = slice(int(step.query_starts[row]), int(step.query_starts[row + 1]))
            slots = torch.from_numpy(step.slot_mapping[0, span]).to(self.device).long()
            for past, present in self.states.items():
                new = made[present][i, :, P : P + counts[row]].transpose(0, 1)
                self.caches[past].flatten(0, 1)[slots] = new
        logits = made[self.logits]
        return torch.cat([logits[i, : counts[row]] for i, row in enumerate(part)])

    def _given(
        self, name: str, step: Step, part: list[int], counts: list[int], starts: list[int], P: int, S: int
    ) -> Tensor:
        """An input of the graph: what was before a sequence's new tokens ends where they begin, padding is around both."""
        B, kind = len(part), self.kinds[name]
        if kind == "state":
            past = torch.zeros(
                B, self._row(name)[0], P, self._row(name)[1], dtype=self._dtype(name), device=self.device
            )
            for i, (row, start) in enumerate(zip(part, starts, strict=True)):
                pages = torch.from_numpy(step.block_table[0, row, : -(-start // self.page)]).to(self.device).long()
                past[i, :, P - start :] = self.caches[name][pages].flatten(0, 1)[:start].transpose(0, 1)
            return past
        filled = torch.zeros(B, P + S if kind == "mask" else S, dtype=self._dtype(name))
        for i, (row, start) in enumerate(zip(part, starts, strict=True)):
            first, count = int(step.query_starts[row]), counts[row]
            if kind == "mask":
                filled[i, P - start : P + count] = 1
            else:
                source = step.tokens if kind == "tokens" else step.positions
                filled[i, :count] = torch.from_numpy(source[first : first + count])
        return filled.to(self.device)


def prompt(graph: Graph, tokens: Tensor) -> dict[Value, Tensor]:
    """What a graph takes for a prompt [S] without a past.

    Raises:
        UnsupportedOperator: it takes something else, or no token ids.
    """
    states = _states(graph)
    kinds = _kinds(graph, states)
    S = len(tokens)
    found = {}
    for value in graph.inputs:
        kind, shape, dtype = kinds[value.name], value.shape, value.dtype
        if not kind or shape is None or dtype is None:
            raise UnsupportedOperator(f"what input '{value.name}' is for is not known")
        if kind == "state":
            found[value] = torch.zeros(1, int(shape[1]), 0, int(shape[3]), dtype=dtype.torch)
        else:
            row = {"tokens": tokens, "positions": torch.arange(S), "mask": torch.ones(S)}[kind]
            found[value] = row[None].to(dtype.torch)
    return found


def _states(graph: Graph) -> dict[str, str]:
    """The inputs that hold keys or values [B, G, P, Dh], and the outputs that hold them afterwards."""
    found = {}
    for node in graph.nodes:
        if node.domain == FUSER and node.op in ("rotary_cache_write", "cache_write"):
            pairs = [*zip(node.inputs[-2:], node.outputs[-2:], strict=True)]
        elif node.is_a("Concat") and node.attributes.get("axis") in (2, -2):
            pairs = [(node.inputs[0], node.output)]
        else:
            continue
        for past, present in pairs:
            if past is not None and past in graph.inputs and present in graph.outputs and _is_sized(past):
                found[past.name] = present.name
    return found


def _is_sized(past: Value) -> bool:
    return past.shape is not None and len(past.shape) == 4 and all(isinstance(past.shape[i], int) for i in (1, 3))


def _kinds(graph: Graph, states: dict[str, str]) -> dict[str, str]:
    """What each input is for: `tokens`, `positions` (of their shape), `mask`, `state`; nothing where that is not known."""
    found = dict.fromkeys((value.name for value in graph.inputs), "")
    tokens = next((value for value, kind in inputs_of(graph).items() if kind == "tokens"), None)
    for value in graph.inputs:
        if value is tokens:
            found[value.name] = "tokens"
        elif value.name in states:
            found[value.name] = "state"
        elif tokens is not None and value.shape is not None and len(value.shape) == 2:
            is_integer = value.dtype is not None and not value.dtype.is_float
            found[value.name] = "positions" if is_integer and value.shape == tokens.shape else "mask"
    return found


def _rows(graph: Graph, tokens: Value) -> int:
    """The rows of the table that token ids choose from."""
    sizes = [
        node.inputs[0].constant.shape[0] for node in graph.nodes
        if node.is_a("Gather") and shifted(node.input(1)) == (tokens, 0)
        and node.inputs[0] is not None and node.inputs[0].constant is not None
    ]  # fmt: skip
    return min(sizes)

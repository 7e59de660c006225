"""Runs an engine's steps by programs over pages: kernel by kernel, or as CUDA graphs."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fuser.codegen import cache
from fuser.codegen.embedding import Embedding
from fuser.codegen.program import Input
from fuser.codegen.sampling import Top, top
from fuser.pipeline import Progress
from fuser.runtime.engine import Ints, Step
from fuser.stepping import Bound, Stepper

# How many tokens programs of one-token steps are made for; a step takes the next larger one.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def bucket(count: int) -> int:
    """The number of tokens that a step of `count` is filled up to."""
    return next((size for size in BUCKETS if size >= count), -(-count // BUCKETS[-1]) * BUCKETS[-1])


class PagedRunner:
    """Steps by programs. On a CUDA device a step of one token a sequence is one CUDA graph, captured when it is first taken.

    On the reference kernels every step is filled up to a bucket, so that a row's numbers do not depend on who is beside it.
    """

    def __init__(
        self, stepper: Stepper, *, step_tokens: int, step_rows: int, sequences: int, positions: int,
        graph_bytes: int = 1 << 30, note: Progress = lambda stage: None,
    ) -> None:  # fmt: skip
        """
        Args:
            stepper: with its caches allocated.
            step_tokens: the most tokens of a step.
            step_rows: the most tokens of a step whose logits are computed.
            sequences: the most that run at once.
            positions: the longest sequence.
            graph_bytes: no further step is captured once graphs take as much memory.
            note: told what is captured.
        """
        self.stepper, self.device, self.note = stepper, stepper.device, note
        self.looks_ahead = self.device.type == "cuda"
        self.is_reference = stepper.kernels == "reference"
        self.step_tokens, self.step_rows = bucket(step_tokens), bucket(step_rows)
        self.sequences, self.graph_bytes = sequences, graph_bytes
        self.blocks = -(-positions // stepper.page)
        self.groups = max(stepper.groups.values(), default=0) + 1
        # What was chosen last for each row, and one place more, for what nobody asks for.
        self.last = torch.zeros(sequences + 1, dtype=torch.int32, device=self.device)
        self.pool = torch.cuda.graph_pool_handle() if self.looks_ahead else None
        self.captured: dict[int, _Captured] = {}
        self.captured_bytes = 0
        self.rows: Tensor | None = None  # of the step before
        self.vocabulary = self._vocabulary()
        outputs = self._whole.program.outputs
        self.logits = max(outputs, key=lambda name: outputs[name].width)
        self.width = outputs[self.logits].width
        self._tops: dict[int, Callable[[Tensor], Tensor]] = {}

    @property
    def _whole(self) -> Bound:
        """The program that takes any step."""
        return self.stepper.bound(self.step_tokens, decode=False, rows=self.step_rows)

    def _vocabulary(self) -> int:
        """How many tokens are embedded."""
        steps = self._whole.program.steps
        return min(s.what.rows[0] for s in steps if isinstance(s.what, Embedding) and Input("tokens") in s.arguments)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.stepper.copy(*(torch.tensor(pages, device=self.device) for pages in (sources, targets)))

    def choose(self, tokens: Tensor) -> None:
        assert self.rows is not None
        self.last.index_copy_(0, self.rows[: len(tokens)], tokens.to(torch.int32))

    def run(self, step: Step) -> tuple[Tensor, Tensor]:
        if self.looks_ahead and step.decode and len(step.tokens) <= min(BUCKETS[-1], self.step_rows):
            size = bucket(len(step.tokens))
            if size not in self.captured and self.captured_bytes < self.graph_bytes:
                self._capture(size)
            if size in self.captured:
                self.rows, logits, highest = self.captured[size](step)
                return logits, highest
        return self._stepped(step)

    def _stepped(self, step: Step) -> tuple[Tensor, Tensor]:
        """A step launched kernel by kernel."""
        n, m = len(step.tokens), len(step.logit_rows)
        size, rows = (bucket(n), bucket(m)) if self.is_reference else (n, m)
        given = self.placed(step, size, rows)
        tokens = self.substituted(given.pop("tokens"), given.pop("sources"))
        self.rows = given.pop("rows").long()
        logits = self._whole.run(given | {"tokens": tokens, "longest": step.longest})[self.logits]
        highest = self.highest(logits)
        self.last.index_copy_(0, self.rows, highest)
        return logits[:m], highest[:m]

    def placed(self, step: Step, n: int, m: int) -> dict[str, Tensor]:
        """A step's tensors on the device, filled up to n tokens and m rows of logits; by one transfer."""
        nobody = self.sequences
        arrays = {
            "tokens": _filled(step.tokens, n, 0),
            "sources": _filled(step.sources, n, -1),
            "positions": _filled(step.positions, n, 0),
            "slot_mapping": _filled(step.slot_mapping, n, -1),
            "block_table": step.block_table,
            "context_lens": step.context_lens,
            "query_starts": step.query_starts,
            "logit_rows": _filled(step.logit_rows, m, 0),
            "rows": _filled(np.where(step.rows < 0, nobody, step.rows).astype(np.int32), m, nobody),
        }
        if not self.looks_ahead:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        sizes = [-(-array.size // 4) * 4 for array in arrays.values()]  # each begins at a multiple of 16 bytes
        packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
        for part, array in zip(torch.split(packed, sizes), arrays.values(), strict=True):
            part[: array.size] = torch.from_numpy(array.reshape(-1))
        parts = torch.split(packed.to(self.device, non_blocking=True), sizes)
        return {
            name: part[: array.size].view(array.shape)
            for part, (name, array) in zip(parts, arrays.items(), strict=True)
        }

    def substituted(self, tokens: Tensor, sources: Tensor) -> Tensor:
        """The tokens of a step, those that were chosen on the device in their places."""
        chosen = self.last.index_select(0, sources.clamp(min=0))
        return torch.where(sources >= 0, chosen, tokens)

    def highest(self, logits: Tensor) -> Tensor:
        """The first highest of each row, int32."""
        if not self.looks_ahead:
            return logits.argmax(-1).to(torch.int32)
        capacity = bucket(len(logits))
        if capacity not in self._tops:
            self._tops[capacity] = self._top(capacity)
        return self._tops[capacity](logits)

    def _top(self, rows: int) -> Callable[[Tensor], Tensor]:
        kernel = top(Top(self.width, 1, dtype=self.stepper.dtype))
        launch = cache.load(kernel).launch
        floats, counters = (size * rows for size in kernel.workspace)
        partial = torch.empty(floats, device=self.device)
        arrived = torch.zeros(counters, dtype=torch.int32, device=self.device)
        cold = torch.zeros(rows, device=self.device)

        def highest(logits: Tensor) -> Tensor:
            n = len(logits)
            values, normalizer = (torch.empty(n, 1, device=self.device) for _ in range(2))
            indices = torch.empty(n, 1, dtype=torch.int32, device=self.device)
            launch(logits, cold[:n], values, indices, normalizer, partial, arrived)
            return indices[:, 0]

        return highest

    def _capture(self, size: int) -> None:
        self.note(f"capturing steps of {size}")
        before = torch.cuda.memory_allocated(self.device)
        self.captured[size] = _Captured(self, size)
        self.captured_bytes += torch.cuda.memory_allocated(self.device) - before


class _Captured:
    """A step of `size` sequences with one token each, as a CUDA graph from what is placed to what is chosen."""

    def __init__(self, runner: PagedRunner, size: int) -> None:
        self.runner, self.size = runner, size
        device, groups = runner.device, runner.groups
        self.bound = runner.stepper.bound(size, decode=True)
        self.head = torch.zeros(5 + groups, size, dtype=torch.int32, device=device)
        self.table = torch.zeros(groups, size, runner.blocks, dtype=torch.int32, device=device)
        nobody = torch.tensor([0, -1, 0, 0, runner.sequences] + [-1] * groups, dtype=torch.int32, device=device)
        self.head.copy_(nobody[:, None].expand_as(self.head))
        self.nobody = nobody.cpu().numpy()
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles, and places what is made once
            self._body()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=runner.pool):
            self.rows, self.logits, self.highest = self._body()

    def _body(self) -> tuple[Tensor, Tensor, Tensor]:
        runner, (tokens, sources, positions, context, rows) = self.runner, self.head[:5]
        given = {
            "tokens": runner.substituted(tokens, sources), "positions": positions, "slot_mapping": self.head[5:],
            "context_lens": context, "block_table": self.table,
        }  # fmt: skip
        logits = self.bound.run(given)[runner.logits]
        highest = runner.highest(logits)
        where = rows.long()
        runner.last.index_copy_(0, where, highest)
        return where, logits, highest

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        n, blocks = len(step.tokens), step.block_table.shape[-1]
        rows = np.where(step.rows < 0, self.runner.sequences, step.rows)
        packed = np.empty((len(self.head), self.size), np.int32)
        packed[:, n:] = self.nobody[:, None]
        packed[:, :n] = [step.tokens, step.sources, step.positions, step.context_lens, rows, *step.slot_mapping]
        staged = torch.empty(packed.size + step.block_table.size, dtype=torch.int32, pin_memory=True)
        staged[: packed.size] = torch.from_numpy(packed.reshape(-1))
        staged[packed.size :] = torch.from_numpy(step.block_table.reshape(-1))
        placed = staged.to(self.runner.device, non_blocking=True)
        self.head.copy_(placed[: packed.size].view(self.head.shape))
        self.table[:, :n, :blocks] = placed[packed.size :].view(step.block_table.shape)
        self.graph.replay()
        return self.rows, self.logits[:n], self.highest[:n]


def _filled(array: Ints, size: int, value: int) -> Ints:
    """The last axis filled up to a size."""
    missing = size - array.shape[-1]
    if not missing:
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)], constant_values=value)

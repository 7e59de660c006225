"""What a graph of few launches becomes: a program of steps over rows of tokens, and paged caches.

A program takes the new tokens of any sequences, flattened to n rows, whose places the step inputs say:
tokens, positions, slot_mapping [n] int32; block_table [sequences, blocks], context_lens [sequences] int32, the new tokens
included; for more than one new token a sequence also query_starts [sequences + 1] int32 and `longest`; where outputs are of
chosen rows alone, logit_rows [m] int32. Slots and tables may differ from state to state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fuser.codegen.arrangement import Tokens
from fuser.codegen.kernel import DTYPES, Kernel
from fuser.codegen.linear import Linear
from fuser.codegen.quantized import order_of
from fuser.constants import Constant
from fuser.graph import Node, Origin

INPUTS = ("tokens", "positions", "slot_mapping", "block_table", "context_lens", "query_starts", "longest", "logit_rows")


@dataclass(frozen=True)
class Weight:
    """A tensor that is made once from the graph's constants, in the program's element type unless stated.

    `linear`: `base` [K, N] as [N, K], its columns times `scale` [K]. `column_sums`: the sums over K of such a linear, float32.
    `bias`: `base` [N] (none: zeros), plus `shift` [K] @ `linear` [K, N]. `vector`: as it is. `table`: the rows `start`, ... of
    `base`. `cos`, `sin`: of positions `start`, ... times `base` [R] frequencies, times `factor`, float32. `codes`, `scales`,
    `zeros`: of a quantized `base`, as the kernel of `product` reads them.
    """

    kind: Literal["linear", "column_sums", "bias", "vector", "table", "cos", "sin", "codes", "scales", "zeros"]
    base: Constant | None
    scale: Constant | None = None
    shift: Constant | None = None
    linear: Constant | None = None
    start: int = 0
    factor: float = 1.0
    product: Linear | None = None

    @property
    def key(self) -> Any:
        """What identifies the tensor: weights made alike from the same stored ones have equal keys."""
        held = (self.base, self.scale, self.shift, self.linear)
        order = order_of(self.product) if self.product is not None else None
        return self.kind, *(c.key if c is not None else None for c in held), self.start, self.factor, order


@dataclass(eq=False)
class Rows:
    """A tensor [n, width], a row for each token, or [m, width] of the `selected` ones; rows of one `place` share its memory."""

    width: int
    selected: bool = False
    place: int = -1


@dataclass(frozen=True)
class Part:
    """Columns of rows."""

    rows: Rows
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Scratch:
    """A matrix [N, K] in the program's element type, which a step makes and the next one reads; all share one memory."""

    N: int
    K: int


@dataclass(eq=False)
class State:
    """The keys and values of one layer, [pages, page, G, Dh] each; a layer with a window never looks further back."""

    past: tuple[str, str]  # names of the graph's inputs
    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True)
class Input:
    """One of INPUTS; slots and tables are those of a state."""

    name: str
    state: State | None = None


@dataclass(frozen=True)
class Cached:
    """The keys or the values of a state."""

    state: State
    which: Literal["k", "v"]


Argument = Weight | Rows | Part | Input | Cached | Scratch


@dataclass(eq=False)
class Step:
    """One launch, or what torch computes: `kernel` a Triton kernel; `product` x, weight, [bias,] y; `nodes` of the graph.

    `arguments` in the order of the kernel's launch (of nodes: their inputs, then their outputs).
    """

    kind: Literal["kernel", "product", "nodes"]
    arguments: Sequence[Argument]
    origin: Origin
    kernel: Kernel | None = None
    what: Any = None  # the family's description, of which the kernel was made
    nodes: Sequence[Node] = ()
    by_sequence: bool = False  # whether the kernel's workspace is for one sequence
    reason: str = ""  # why no kernel computes the nodes


@dataclass(eq=False)
class Program:
    """Steps in order; `outputs` are rows, by the names of the graph's outputs."""

    dtype: str
    tokens: int  # at most
    page: int
    dims: Tokens
    decode: bool  # whether every sequence has one new token
    rows: int | None = None  # at most so many rows of outputs, chosen by logit_rows; None: a row for each token
    steps: list[Step] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    outputs: dict[str, Rows | Part] = field(default_factory=dict)

    @property
    def kernels(self) -> list[Kernel]:
        """Each kernel once, in the order of its first launch."""
        found = {step.kernel.text: step.kernel for step in self.steps if step.kernel is not None}
        return list(found.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of the memory that rows, and matrices made on the way, take."""
        held = [a.rows if isinstance(a, Part) else a for step in self.steps for a in step.arguments]
        sizes = {
            r.place: (self.rows or 0 if r.selected else self.tokens) * r.width for r in held if isinstance(r, Rows)
        }
        return (sum(sizes.values()) + self.scratch) * DTYPES[self.dtype]

    @property
    def scratch(self) -> int:
        """Elements of the memory that matrices made on the way share."""
        made = [a.N * a.K for step in self.steps for a in step.arguments if isinstance(a, Scratch)]
        return max(made, default=0)

    def share(self) -> None:
        """Gives every rows a place: those of one size take one another's memory, once nothing reads them any more."""
        last: dict[Rows, int] = {}
        for index, step in enumerate(self.steps):
            for argument in step.arguments:
                rows = argument.rows if isinstance(argument, Part) else argument
                if isinstance(rows, Rows):
                    last[rows] = index
        for output in self.outputs.values():
            last[output.rows if isinstance(output, Part) else output] = len(self.steps)
        free: dict[tuple[int, bool], list[int]] = {}
        places = 0
        for index, step in enumerate(self.steps):
            read = (a.rows if isinstance(a, Part) else a for a in step.arguments)
            own = list(dict.fromkeys(rows for rows in read if isinstance(rows, Rows)))
            for rows in sorted((r for r in own if r.place < 0), key=lambda r: r.width):
                if free.get((rows.width, rows.selected)):
                    rows.place = free[rows.width, rows.selected].pop()
                else:
                    rows.place, places = places, places + 1
            for rows in own:
                if last[rows] == index:
                    free.setdefault((rows.width, rows.selected), []).append(rows.place)

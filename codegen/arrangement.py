"""How a value of the graph lies in rows of tokens: which axis counts tokens, and what a row holds."""

import math
from dataclasses import dataclass

from fuser.dims import Dim, equal
from fuser.graph import Node, Value


@dataclass(frozen=True)
class Tokens:
    """The dims that count tokens: sequences, and new tokens of each."""

    batch: Dim
    sequence: Dim


@dataclass(frozen=True)
class Arrangement:
    """A value [batch, .., sequence, ..] as rows: `axis` is the sequence's, `row` the other dims in order."""

    axis: int
    row: tuple[int, ...]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.row)

    @property
    def before(self) -> int:
        """How many parts of a row come before the tokens."""
        return math.prod(self.row[: self.axis - 1])


def arrangement(value: Value | None, tokens: Tokens) -> Arrangement | None:
    """How a value lies in rows; None if it has not one row for each token, of a fixed width."""
    if value is None or value.shape is None or len(value.shape) < 2 or not equal(value.shape[0], tokens.batch):
        return None
    axes = [axis for axis, dim in enumerate(value.shape) if axis and equal(dim, tokens.sequence)]
    if len(axes) != 1:
        return None
    row = [dim for axis, dim in enumerate(value.shape) if axis not in (0, axes[0])]
    sizes = tuple(dim for dim in row if isinstance(dim, int))
    return Arrangement(axes[0], sizes) if len(sizes) == len(row) else None


def keeps_rows(node: Node, tokens: Tokens) -> bool:
    """Whether a node gives the rows of its first input as they are, only by other dims (or in another float type)."""
    if node.domain or not node.inputs:
        return False
    before, after = (arrangement(value, tokens) for value in (node.inputs[0], node.output))
    if before is None or after is None or before.width != after.width:
        return False
    if node.op in ("Identity", "Unsqueeze", "Squeeze"):
        return True
    if node.op == "Cast":
        return all(v is not None and v.dtype is not None and v.dtype.is_float for v in (node.inputs[0], node.output))
    if node.op == "Reshape":  # as much comes before the tokens, and so as much after them
        return before.before == after.before
    if node.op == "Transpose":
        perm = [axis for axis in node.attributes["perm"] if axis not in (0, before.axis)]
        return node.attributes["perm"][0] == 0 and perm == sorted(perm)
    return False

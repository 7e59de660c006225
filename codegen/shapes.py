"""The launches of one layer, and of the vocabulary, of models that everybody measures by."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fuser.codegen.linear import Linear
from fuser.codegen.rotary import Rotary
from fuser.formats import Format


@dataclass(frozen=True)
class Shape:
    """A Llama's widths: D hidden, F feed-forward, V vocabulary, H query and G key heads of Dh."""

    D: int
    F: int
    V: int
    H: int
    G: int
    Dh: int = 128

    def linears(
        self, tokens: int, dtype: str = "bf16", kv_group: int = 0, format: Format | None = None
    ) -> Iterator[tuple[str, Linear]]:
        """The products of a decode step, as they are launched: with `kv_group`, keys and values are written by another one."""
        rotary = None if kv_group else Rotary(self.H, self.G, self.Dh, self.Dh, dtype=dtype)
        width = (self.H + 2 * self.G) * self.Dh
        norm: dict[str, Any] = {} if format is not None else {"norm": "rms", "norm_eps": 1e-5}
        before = "norm+" if norm else ""
        yield (
            f"{before}qkv{'+rotary' if rotary else ''}",
            Linear(width, self.D, tokens, dtype, rotary=rotary, format=format, **norm),
        )
        yield "o+residual", Linear(self.D, self.H * self.Dh, tokens, dtype, residual=True, format=format)
        gate_up = Linear(2 * self.F, self.D, tokens, dtype, activation="silu", format=format, **norm)
        yield f"{before}gate_up+silu", gate_up
        yield "down+residual", Linear(self.D, self.F, tokens, dtype, residual=True, format=format)

    def vocabulary(self, tokens: int, dtype: str = "bf16") -> Linear:
        """The last product."""
        return Linear(self.V, self.D, tokens, dtype, norm="rms", norm_eps=1e-5)


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32000, 32, 32),
    "llama-3-8b": Shape(4096, 14336, 128256, 32, 8),
}

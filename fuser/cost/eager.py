"""A decoder's step as eager torch computes it without fusion, operator by operator: what fusion is compared with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from fuser.cost.workload import Shape

Made = Callable[[], object]


@dataclass
class Operator:
    """One operator: a call for each of several layers, the bytes and FLOPs of one, and how many torch operators it is."""

    name: str
    calls: list[Made]
    bytes: float
    flops: float = 0.0
    launches: int = 1
    is_layer: bool = True


@dataclass
class Layer:
    """Tensors of one layer, and of a step of n tokens through it."""

    shape: Shape
    n: int
    context: int
    dtype: torch.dtype
    device: torch.device
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.shape
        D, F, H, G, Dh = s.hidden, s.feed_forward, s.heads, s.kv_heads, s.head_dim
        sizes = {"q": (H * Dh, D), "k": (G * Dh, D), "v": (G * Dh, D), "o": (D, H * Dh), "up": (F, D), "down": (D, F)}
        sizes |= {"gate": (F, D)} if s.gated else {}
        self.weights = {name: self.drawn(*size) * size[1] ** -0.5 for name, size in sizes.items()}
        self.x, self.skip, self.wide, self.other, self.mixed = (
            self.drawn(self.n, width) for width in (D, D, F, F, H * Dh)
        )
        self.scale, self.shift = self.drawn(D), self.drawn(D)
        self.queries, self.new_k, self.new_v = (self.drawn(self.n, heads, 1, Dh) for heads in (H, G, G))
        self.keys, self.values = (self.drawn(self.n, G, self.context, Dh) for _ in "kv")
        self.cos, self.sin = (self.drawn(self.n, 1, 1, Dh) for _ in "cs")
        self.place = torch.tensor([self.context - 1], device=self.device)

    def drawn(self, *size: int) -> Tensor:
        return torch.randn(*size, dtype=self.dtype, device=self.device)

    def norm(self) -> Tensor:
        """As models write it: an RMSNorm in float32 by its own operators, a LayerNorm by one."""
        if self.shape.norm != "rms":
            return functional.layer_norm(self.x, (self.shape.hidden,), self.scale, self.shift)
        wide: Tensor = self.x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.scale * wide.to(self.dtype)

    def linear(self, name: str) -> Tensor:
        x = self.wide if name == "down" else self.mixed if name == "o" else self.x
        return functional.linear(x, self.weights[name])

    def rotary(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned: Tensor = torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin
        return x * self.cos + turned

    def write(self) -> None:
        self.keys.index_copy_(2, self.place, self.new_k)
        self.values.index_copy_(2, self.place, self.new_v)

    def attention(self) -> Tensor:
        grouped = self.shape.heads != self.shape.kv_heads
        return functional.scaled_dot_product_attention(self.queries, self.keys, self.values, enable_gqa=grouped)


def operators(
    shape: Shape, n: int, context: int, dtype: torch.dtype, device: torch.device, layers: int
) -> Iterator[Operator]:
    """The operators of a layer, in order, and those after the last; each on the tensors of `layers` layers in turn."""
    made = [Layer(shape, n, context, dtype, device) for _ in range(layers)]
    size = made[0].x.element_size()
    D, F, H, G, Dh = shape.hidden, shape.feed_forward, shape.heads, shape.kv_heads, shape.head_dim

    def each(
        name: str, call: Callable[[Layer], object], elements: float, launches: int = 1, flops: float = 0
    ) -> Operator:
        return Operator(name, [partial(call, layer) for layer in made], elements * size, flops, launches)

    def linear(name: str, label: str) -> Operator:
        N, K = made[0].weights[name].shape
        return each(label, lambda layer: layer.linear(name), N * K + n * (N + K), 1, 2.0 * n * N * K)

    def norm(name: str) -> Operator:
        rms = shape.norm == "rms"  # of 16 bits: 4 wide tensors written and read between
        return each(name, Layer.norm, n * D * (15 if rms else 2), 8 if rms else 1, 4.0 * n * D)

    def residual(name: str) -> Operator:
        return each(name, lambda layer: layer.x + layer.skip, 3 * n * D, 1, n * D)

    yield norm("norm A")
    for name in "qkv":
        yield linear(name, name)
    if shape.positions == "rotary":
        turned = n * (H + G) * Dh
        yield each(
            "rotary", lambda layer: (layer.rotary(layer.queries), layer.rotary(layer.new_k)), turned * 9, 10, 3.0 * turned
        )  # fmt: skip
    yield each("cache write", Layer.write, 4 * n * G * Dh, 2)
    seen = 2 * n * G * context * Dh + 2 * n * H * Dh
    yield each("attention", Layer.attention, seen, 1, 4.0 * n * H * Dh * context)
    yield linear("o", "o")
    yield residual("residual A")
    yield norm("norm B")
    if shape.gated:
        yield linear("gate", "feed-forward A, gate")
    yield linear("up", "feed-forward A")
    activation = functional.silu if shape.gated else functional.gelu
    yield each("activation", lambda layer: activation(layer.wide), 2 * n * F, 1, 3.0 * n * F)
    if shape.gated:
        yield each("gate", lambda layer: layer.wide * layer.other, 3 * n * F, 1, n * F)
    yield linear("down", "feed-forward B")
    yield residual("residual B")
    if shape.vocabulary:
        last = norm("norm")
        last.is_layer = False
        yield last
        x = made[0].x
        head = torch.randn(shape.vocabulary, D, dtype=dtype, device=device)
        elements = head.numel() + n * (D + shape.vocabulary)
        flops = 2.0 * n * head.numel()
        yield Operator("head", [lambda: functional.linear(x, head)], elements * size, flops, is_layer=False)

"""Attention masks by what they hold: causal, sliding-window and padding masks, however an exporter builds them.

allowed[b, 0, i, j] = -left <= j - (P + i) <= right and padding[b, j], with P = T - S tokens before the first query.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fuser import dims
from fuser.content import content
from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.fused import fused_op
from fuser.graph import FUSER, Node, Value
from fuser.pattern import require
from fuser.recognition import Disagrees, Recognition, Subject, Symbols

MASKED = -1e4  # a number that is added to scores to mask them is at most this
FAR = 1 << 17  # the longest window that is looked for
WIDEST = 4096  # the largest stored mask that is looked at, all of it


@fused_op("shape[R], padding[B, T]? -> allowed[*M]")
def attention_mask(
    shape: Tensor, padding: Tensor | None = None, *, left_window: int = -1, right_window: int = -1
) -> Tensor:
    """bool, True: attend. `shape` holds the result's: [B or 1, 1, S or 1, T] or [S, T].

    Query i stands at position P + i, P = T - S, and sees keys from `left_window` before it to `right_window` after it (-1:
    all; causal is right_window=0). padding [B, T], of any type: 0 where a key is none.
    """
    *_, S, T = wanted = shape.tolist()
    device = None if padding is None else padding.device
    distance = torch.arange(T, device=device) - (torch.arange(S, device=device)[:, None] + T - S)
    allowed = torch.ones(S, T, dtype=torch.bool, device=device)
    if left_window >= 0:
        allowed &= distance >= -left_window
    if right_window >= 0:
        allowed &= distance <= right_window
    if padding is not None:
        allowed = allowed & (padding != 0)[:, None, None, :]
    return allowed.expand(wanted)


@attention_mask.shapes
def _(bound: dict[str, Any], inputs: Sequence[Value | None], **windows: int) -> list[Shape]:
    shape = content(inputs[0])
    require(isinstance(shape, tuple), "attention_mask: the shape must be known", inputs[0])
    return [shape]


@attention_mask.types
def _(inputs: Sequence[Value | None], attributes: dict[str, Any]) -> list[DType]:
    return [DType.BOOL]


@attention_mask.recognizes
def _(recognition: Recognition) -> None:
    masks: dict[Node, Value | None] = {}  # what was recognised, each with its padding
    for subject in recognition.subjects:
        value = subject.value
        if not _has_the_form(value) or any((given.rank or 0) > 2 for given in subject.inputs):
            continue  # a mask that is fed in ready made is nobody's to recognise
        try:
            held = _held(subject, next(_instances(subject)))
        except (Disagrees, StopIteration):
            continue
        if held is None:
            continue
        try:
            left, right, lowest = _closed_form(subject)
        except Disagrees as reason:
            expected = "allowed[b, 0, i, j] = -left <= j - (past + i) <= right and padding[b, j]"
            recognition.refuse(attention_mask, subject, expected, str(reason))
            continue
        padding = subject.inputs[0] if subject.inputs else None
        wanted = _shape(subject, padding)
        if wanted is None:
            continue
        shape = recognition.emit("Dims", subject, [], {"dims": wanted}, domain=FUSER)
        windows = {"left_window": left, "right_window": right}
        new = recognition.emit(attention_mask.name, subject, [shape, padding], windows, domain=FUSER)
        assert new.producer is not None
        masks[new.producer] = padding
        if value.dtype is not None and value.dtype is not DType.BOOL:
            numbers = [recognition.constant(number, value.dtype) for number in (0.0, lowest)]
            new = recognition.emit("Where", subject, [new, *numbers])
        recognition.graph.replace(value, new)
    for subject in recognition.subjects:
        if _tells_of_rows(subject.value):
            _guard(recognition, subject, masks)


def _tells_of_rows(value: Value) -> bool:
    """Whether a value may say of each row of scores [B, H, S, T] whether it attends to anything."""
    shape = value.shape or ()
    return value.dtype is DType.BOOL and len(shape) == 4 and shape[1] == shape[3] == 1 and shape != (1, 1, 1, 1)


def _guard(recognition: Recognition, subject: Subject, masks: Mapping[Node, Value | None]) -> None:
    """A value that says of each row of a recognised mask whether it attends to anything is written as patterns know it."""
    for mask, padding in masks.items():
        allowed = mask.output
        inputs = [] if padding is None else [padding]
        if subject.inputs != inputs or allowed.shape is None or allowed.shape[:3] != (subject.value.shape or ())[:3]:
            continue
        like = replace(subject, value=allowed)  # the mask's sizes are those of the instances
        found = set()
        for instance in _instances(like):
            sizes = _sizes(like, instance)
            wanted = attention_mask.reference(
                torch.tensor(dims.concrete(allowed.shape, sizes or {})),
                instance.tokens() if inputs else None,
                **mask.attributes,
            ).any(-1, keepdim=True)
            try:
                held = subject.evaluate(sizes or {}, _given(subject, instance, sizes or {}))
            except Disagrees:
                break
            found.add(True if torch.equal(held, wanted) else False if torch.equal(held, ~wanted) else None)
        else:
            if len(found) != 1 or None in found:
                continue
            flags = recognition.emit("Cast", subject, [allowed], {"to": DType.FLOAT32.onnx})
            most = recognition.emit("ReduceMax", subject, [flags], {"axes": (-1,), "keepdims": 1})
            attends = recognition.emit("Cast", subject, [most], {"to": DType.BOOL.onnx})
            new = attends if True in found else recognition.emit("Not", subject, [attends])
            recognition.graph.replace(subject.value, new)
            return


def _has_the_form(value: Value) -> bool:
    """Whether a value may be added to scores [B, H, S, T], or choose among them, alike for all heads."""
    shape = value.shape or ()
    is_mask = value.dtype is DType.BOOL or (value.dtype is not None and value.dtype.is_float)
    return is_mask and (len(shape) == 2 or (len(shape) == 4 and shape[1] == 1)) and shape[-1] != 1


@dataclass(frozen=True)
class _Instance:
    """Sizes of one evaluation, and which tokens are padding."""

    B: int
    S: int
    T: int
    padding: str = "none"

    def tokens(self) -> Tensor:
        """[B, T], 1 where there is a token and 0 where there is padding."""
        found = torch.ones(self.B, self.T, dtype=torch.int64)
        part = max(1, self.T // 3)
        if self.padding == "left":
            found[0, :part] = 0
        elif self.padding == "right":
            found[-1, -part:] = 0
        elif self.padding == "scattered":
            found[0, 1::3], found[-1, ::2] = 0, 0
        elif self.padding == "everywhere":
            found[0] = 0
        return found

    def __str__(self) -> str:
        padded = "" if self.padding == "none" else f", padding {self.padding}"
        return f"batch {self.B}, {self.S} new tokens on {self.T - self.S}{padded}"


# (B, S, P, padding); odd sizes, no past, one token, all kinds of padding.
_CASES = (
    (1, 3, 2, "none"), (2, 5, 3, "none"), (3, 7, 0, "none"), (1, 1, 0, "none"), (2, 1, 6, "none"), (2, 3, 5, "left"),
    (2, 4, 3, "right"), (3, 5, 4, "scattered"), (2, 3, 4, "everywhere"), (2, 6, 0, "left"), (2, 6, 0, "right"),
    (2, 1, 9, "left"),
)  # fmt: skip


def _instances(subject: Subject) -> Iterator[_Instance]:
    """The instances that a subject's fixed dims allow; those that show where a window ends come last."""
    shape = subject.value.shape or ()
    lengths = [number for number in subject.numbers if number <= FAR]
    extent = subject.extent
    whole = [] if extent is None else [(1, extent, 0, "none"), (1, 3, extent - 3, "none"), (2, 1, extent - 1, "left")]
    far = [(1, 3, lengths[-1] + 2, "none"), (2, 3, lengths[-1] + 2, "left")] if lengths else []
    between = [(2, 5, length + shift, "left") for length in lengths[-3:] for shift in (-4, -3, -1)]
    for B, S, P, padding in (*_CASES, *((b, s, max(0, p), padding) for b, s, p, padding in (*between, *far, *whole))):
        batch = shape[0] if len(shape) == 4 and isinstance(shape[0], int) and subject.inputs else B
        new = shape[-2] if isinstance(shape[-2], int) else S
        total = shape[-1] if isinstance(shape[-1], int) else new + P
        instance = _Instance(batch if isinstance(batch, int) else B, new, total, padding)
        if total >= new and total <= (extent or total) and _sizes(subject, instance) is not None:
            yield instance


def _sizes(subject: Subject, instance: _Instance, otherwise: int = 0) -> dict[Any, int] | None:
    shape = subject.value.shape or ()
    wanted = [(shape[-2], instance.S), (shape[-1], instance.T)]
    if len(shape) == 4 and shape[0] != 1:
        wanted.append((shape[0], instance.B))
    for given in subject.inputs:
        assert given.shape is not None
        wanted += zip(given.shape, (instance.B, instance.T), strict=False)
    return subject.sizes(wanted, otherwise)


def _given(subject: Subject, instance: _Instance, sizes: Symbols) -> dict[Value, Tensor]:
    """What a subject's inputs hold on an instance: the padding."""
    given = {}
    for value in subject.inputs:
        dtype = torch.float64 if value.dtype is None or value.dtype.is_float else getattr(torch, str(value.dtype))
        given[value] = instance.tokens().to(dtype)[: dims.concrete((value.shape or ())[:1], sizes)[0]]
    return given


def _held(subject: Subject, instance: _Instance) -> tuple[Tensor, float] | None:
    """(what is allowed, the number that masks) on an instance; None where that is not what the value says."""
    found: Tensor | None = None
    # A length that no dim of its own tells is that of all tokens, or of the past.
    for otherwise in (instance.T, instance.T - instance.S):
        sizes = _sizes(subject, instance, otherwise)
        assert sizes is not None
        try:
            found = subject.evaluate(sizes, _given(subject, instance, sizes))
            break
        except Disagrees:
            if otherwise != instance.T:
                raise
    assert found is not None
    if found.dtype == torch.bool:
        return found, 0.0
    others = found[found != 0]
    if others.isnan().any() or (others > MASKED).any():
        return None
    lowest = others[0].item() if others.numel() else 0.0
    return (found == 0, lowest) if bool((others == lowest).all()) else None


def _closed_form(subject: Subject) -> tuple[int, int, float]:
    """(left_window, right_window, the number that masks).

    Raises:
        Disagrees: the closed form does not hold on some instance.
    """
    if len(subject.inputs) > 1:
        names = ", ".join(given.name for given in subject.inputs)
        raise Disagrees(f"it depends on {names}, of which one may be the padding")
    if subject.numbers and subject.numbers[-1] > FAR:
        raise Disagrees(f"a window of {subject.numbers[-1]} would be longer than any that is tried")
    if subject.extent is not None and subject.extent > WIDEST:
        raise Disagrees(f"the mask it stores is larger than {WIDEST}")
    for given in subject.inputs:
        if any(user.is_a("Gather") and user.input(1) is given for user in given.consumers):
            raise Disagrees(f"it depends on {given.name}, which indexes a table: more than a token or none")
        if not _depends_on_padding(subject):
            raise Disagrees(f"it reads {given.name}, of which 0 and 1 show nothing")
        if subject.value.rank != 4:
            raise Disagrees(f"it depends on {given.name} and is one mask for all sequences")
    instances = list(_instances(subject))
    varies = any(not isinstance(dim, int) for dim in (subject.value.shape or ())[-2:])
    if varies and len({(instance.S, instance.T) for instance in instances}) < 3:
        raise Disagrees(f"its sizes allow little else than {instances[0]}")
    probe = max((i for i in instances if i.padding == "none"), key=lambda i: (i.T, i.S), default=instances[-1])
    left, right = _windows(subject, probe)
    numbers: set[float] = set()
    for instance in instances:
        held = _held(subject, instance)
        if held is None:
            raise Disagrees(f"{instance}: masked scores get different numbers")
        allowed, lowest = held
        sizes = _sizes(subject, instance)
        padding = instance.tokens() if subject.inputs else None
        shape = dims.concrete(subject.value.shape or (), sizes or {})
        wanted = attention_mask.reference(torch.tensor(shape), padding, left_window=left, right_window=right)
        if allowed.shape != wanted.shape:
            raise Disagrees(f"{instance}: it has shape {list(allowed.shape)}")
        if not torch.equal(allowed, wanted):
            *lead, i, j = (allowed != wanted).nonzero()[0].tolist()
            attends = "attends" if allowed[(*lead, i, j)] else "does not attend"
            row = f"query {i}" + (f" of sequence {lead[0]}" if lead else "")
            form = f"left {left}, right {right}" if left >= 0 else "causal" if right == 0 else "no window"
            raise Disagrees(f"{instance}: {row} {attends} to key {j} ({form})")
        if not allowed.all():
            numbers.add(lowest)
    if len(numbers) > 1:
        raise Disagrees(f"masked scores get {' or '.join(f'{number:g}' for number in sorted(numbers))}")
    return left, right, numbers.pop() if numbers else -math.inf


def _windows(subject: Subject, instance: _Instance) -> tuple[int, int]:
    """How far queries see to the left and to the right, -1 for all the way, as an instance without padding shows."""
    held = _held(subject, instance)
    if held is None:
        raise Disagrees(f"{instance}: masked scores get different numbers")
    allowed = held[0].reshape(-1, *held[0].shape[-2:])
    if not (allowed == allowed[0]).all():
        raise Disagrees(f"{instance}: sequences differ")
    S, T = allowed.shape[-2:]
    distance = torch.arange(T) - (torch.arange(S)[:, None] + T - S)
    seen = distance[allowed[0]]
    if not seen.numel():
        raise Disagrees(f"{instance}: no query attends to any key")
    nearest, farthest = int(seen.max()), int(-seen.min())
    left = -1 if farthest == T - 1 else farthest
    right = -1 if nearest == S - 1 else nearest
    if left < -1 or right < -1 or (right > 0 and right != left):
        raise Disagrees(f"{instance}: queries attend to keys from {-farthest} to {nearest} of their own position")
    return left, right


def _shape(subject: Subject, padding: Value | None) -> Shape | None:
    """The mask's shape in terms of sizes that are known without it; None where nothing else tells them."""
    *lead, total = subject.value.shape or ()
    if padding is not None and padding.shape is not None and subject.makes(total):
        total = padding.shape[1]  # so it was on every instance
    shape = (*lead, total)
    return None if any(subject.makes(dim) for dim in shape) else shape


def _depends_on_padding(subject: Subject) -> bool:
    """Whether the input says which tokens are padding, or is just there."""
    for instance in _instances(subject):
        if instance.padding == "scattered":
            held, whole = _held(subject, instance), _held(subject, replace(instance, padding="none"))
            return held is not None and whole is not None and not torch.equal(held[0], whole[0])
    return True


@attention_mask.lower("functions")
def _(op: Any, shape: Any, padding: Any, *, left_window: int, right_window: int) -> Any:
    dims_ = content(shape)
    S, T = (op.size(shape, axis) for axis in (-2, -1))
    zero, one = (op.constant(number, DType.INT64) for number in (0, 1))
    parts = []
    if left_window >= 0 or right_window >= 0:
        keys = op.Range(zero, T, one)
        queries = op.Unsqueeze(op.Range(op.Sub(T, S), T, one), axes=(-1,))
        if right_window >= 0:
            last = op.Add(queries, op.constant(right_window, DType.INT64)) if right_window else queries
            parts.append(op.LessOrEqual(keys, last))
        if left_window >= 0:
            parts.append(op.GreaterOrEqual(keys, op.Sub(queries, op.constant(left_window, DType.INT64))))
    if padding is not None:
        tokens = op.Cast(padding, to=DType.BOOL.onnx)
        # A Reshape, not an Unsqueeze: it says that the padding is as long as the mask.
        if dims_ is not None:
            parts.append(op.Reshape(tokens, shape=(dims_[0], 1, 1, dims_[-1])))
        else:
            ends = [op.Gather(shape, op.constant((axis,), DType.INT64), axis=0) for axis in (0, -1)]
            parts.append(op.Reshape(tokens, op.Concat(ends[0], op.constant((1, 1), DType.INT64), ends[1], axis=0)))
    allowed = reduce(op.And, parts) if parts else op.constant(True, DType.BOOL)
    return allowed if dims_ is not None and allowed.shape == dims_ else op.Expand(allowed, shape)


_SIZES = {"B": 2, "S": 3, "T": 7, "R": 4, "kinds": {"shape": "sizes", "padding": "padding"}}
attention_mask.examples(
    {**_SIZES, "M": ("B", 1, "S", "T"), "left_window": -1, "right_window": 0},
    {**_SIZES, "M": ("B", 1, "S", "T"), "left_window": 4, "right_window": 0},
    {**_SIZES, "M": ("B", 1, 1, "T"), "left_window": -1, "right_window": -1},
    {**_SIZES, "M": ("S", "T"), "left_window": -1, "right_window": 0, "without": ("padding",)},
    {**_SIZES, "M": (1, 1, "S", "T"), "left_window": 2, "right_window": 2, "without": ("padding",)},
)

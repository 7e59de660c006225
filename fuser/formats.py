"""Quantized formats of weights: what their codes and scales mean. Packing, references, kernels and files agree on this page.

A weight [N, K] (K its inputs) is taken in groups of `group` neighbours along K, the last one perhaps shorter, and is
w = value(code) * scale.
"""

from dataclasses import dataclass, replace

from fuser.errors import UsageError

# The quantiles of a normal distribution that NF4 codes stand for (QLoRA, arXiv:2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP8_MOST = 448.0  # the largest number of E4M3
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        kind: `int8`, `int4`: value = code - zero, the zero in the middle (128, 8) unless asymmetric; `nf4`: value = NF4[code];
            `fp8`: value = the E4M3 number whose bits the code is.
        group: neighbours along K that share a scale; None: all of a row.
        symmetric: whether the zero is in the middle: scale = max|w| / 127 (or 7). Otherwise each group has a zero of its own,
            scale = (max - min) / 255 (or 15).
        activations: what inputs are rounded to, token by token, scale = max|x| / 127 (E4M3: 448); None: they are as they are.
        double: whether scales are eight bits each (`fuser.quantized.doubled`); of nf4.
    """

    kind: str
    group: int | None = None
    symmetric: bool = True
    activations: str | None = None
    double: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.kind in ("int4", "nf4") else 8

    @property
    def middle(self) -> int:
        """The code of zero in symmetric integers."""
        return 1 << (self.bits - 1)

    @property
    def most(self) -> float:
        """What the largest weight of a symmetric group becomes."""
        return {"nf4": 1.0, "fp8": FP8_MOST}.get(self.kind, self.middle - 1)

    def grouped(self, K: int) -> int:
        """Neighbours that share a scale in a row of K: never more than the row."""
        return max(min(self.group or K, K), 1)

    def groups(self, K: int) -> int:
        """Scales of a row."""
        return -(-K // self.grouped(K))

    def packed(self, K: int) -> int:
        """Bytes of a row's codes; of two in a byte the first is low."""
        return -(-K * self.bits // 8)

    def __str__(self) -> str:
        if self.activations:
            return "w8a8" if self.kind == "int8" else self.kind
        options = [str(self.group or "channel"), *["asymmetric"] * (not self.symmetric), *["double"] * self.double]
        return ":".join([self.kind, *options])


KNOWN = {
    "int8": Format("int8", 128),
    "int4": Format("int4", 128),
    "nf4": Format("nf4", 64),
    "w8a8": Format("int8", activations="int8"),
    "fp8": Format("fp8", activations="fp8"),
}


def format_of(text: "str | Format", group_size: int | None = None, symmetric: bool | None = None) -> Format:
    """The format that a text names: `int4`, `int8:channel`, `int4:128:asymmetric`, `nf4:64:double`, `w8a8`, `fp8`, ...

    Args:
        group_size: in place of the one that the text says, or of the default.
        symmetric: likewise.

    Raises:
        UsageError: there is none of that name, or it has not that group.
    """
    if isinstance(text, Format):
        return text
    name, *options = text.lower().split(":")
    if name not in KNOWN:
        raise UsageError(f"a quantization is {', '.join(KNOWN)}, not {text!r}")
    found = KNOWN[name]
    for option in options:
        if option == "channel":
            found = replace(found, group=None)
        elif option in ("asymmetric", "symmetric"):
            found = replace(found, symmetric=option == "symmetric")
        elif option == "double":
            found = replace(found, double=True)
        elif option.isdecimal():
            found = replace(found, group=int(option))
        else:
            wanted = "a group size, channel, asymmetric or double"
            raise UsageError(f"quantization {text!r}: an option is {wanted}, not {option!r}")
    if group_size is not None:
        found = replace(found, group=group_size)
    if symmetric is not None:
        found = replace(found, symmetric=symmetric)
    if found.group is not None and found.group not in GROUPS:
        raise UsageError(f"quantization {text!r}: a group is of {', '.join(map(str, GROUPS))}, not {found.group}")
    if found.activations and (found.group is not None or not found.symmetric):
        raise UsageError(f"quantization {text!r}: with quantized inputs a weight has one scale a channel, and no zero")
    if found.kind == "nf4" and not found.symmetric:
        raise UsageError(f"quantization {text!r}: nf4 has no zeros")
    if found.double and found.kind != "nf4":
        raise UsageError(f"quantization {text!r}: only nf4 has scales of eight bits")
    return found

"""Keys and values as int8 codes by groups of channels, each with a scale in float16: how they are made in a kernel."""

from fuser.codegen.kernel import Emitter, power_of_two
from fuser.errors import UsageError

GROUPS, DEFAULT = (32, 64, 128), 64

CODES = '''
@triton.jit
def scale_of(bits):
    """The scales of groups, in float16, of the largest bits of their absolute values: of Inf and NaN it is NaN."""
    wanted = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    near = wanted.to(tl.float16)
    # Rounded up: the nearest one may be smaller, by half where it is subnormal or zero, and the largest would clip.
    above = (near.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    scale = tl.where(near.to(tl.float32) < wanted, above, near)
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def codes_of(x, scale):
    """int8 codes of x, the nearest ones, ties to even; a group of zeros has scale 0."""
    divisor = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    return ((ratio + 12582912.0) - 12582912.0).to(tl.int8)  # where float32 has no fractions


@triton.jit
def magnitude(x):
    """The bits of absolute values, whose order is theirs; NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
'''


def kv_group_of(kv_cache: str, dtype: str) -> int:
    """The group that the name of a kind of cache means; 0: keys and values are of `dtype`.

    Raises:
        UsageError: there is no such kind.
    """
    known = {"auto": 0, dtype: 0, "int8": DEFAULT} | {f"int8:{group}": group for group in GROUPS}
    if kv_cache not in known:
        raise UsageError(f"kv_cache must be {', '.join(known)}, got {kv_cache!r}")
    return known[kv_cache]


def checked_group(kv_group: int, head_dim: int) -> int:
    """`kv_group`, if heads are made of such groups.

    Raises:
        UsageError: they are not.
    """
    if kv_group and (head_dim % kv_group or kv_group % 2 or kv_group not in (*GROUPS, head_dim)):
        raise UsageError(
            f"codegen: int8 keys and values have groups of 32, 64 or 128 channels that divide a head, or of all {head_dim}, "
            f"an even number, not of {kv_group}"
        )
    return kv_group


def group_of(kv_group: int, head_dim: int) -> int:
    """The group of heads of this width where `kv_group` is asked for: at most all of it.

    Raises:
        UsageError: it does not divide them.
    """
    return checked_group(min(kv_group, head_dim), head_dim)


def quantizes(e: Emitter) -> None:
    """Gives the kernel the device functions `magnitude`, `scale_of` and `codes_of`."""
    e.part(CODES)


def group_constants(e: Emitter, kv_group: int, head_dim: int) -> None:
    """GROUPS of W channels, and the blocks that hold them."""
    groups = head_dim // kv_group
    e.constant(GROUPS=groups, W=kv_group, BLOCK_GROUPS=power_of_two(groups), BLOCK_W=power_of_two(kv_group))

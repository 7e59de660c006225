"""One file per fusion: its meaning, the source graphs exporters write for it, and its lowerings."""

from fuser.fused import FusedOp
from fuser.patterns import attention_targets  # noqa: F401  it declares lowerings
from fuser.patterns.attention import attention
from fuser.patterns.attention_mask import attention_mask
from fuser.patterns.cache_write import cache_write
from fuser.patterns.fake_quantize import fake_quantize
from fuser.patterns.gated_mlp import gated_mlp
from fuser.patterns.gelu import gelu
from fuser.patterns.gelu_tanh import gelu_tanh
from fuser.patterns.layer_norm import layer_norm
from fuser.patterns.packed_linear import packed_linear
from fuser.patterns.position_ids import position_ids
from fuser.patterns.rms_norm import rms_norm
from fuser.patterns.rotary import rotary
from fuser.patterns.rotary_cache_write import rotary_cache_write
from fuser.patterns.rotary_table import rotary_table
from fuser.patterns.silu import silu
from fuser.patterns.skip_layer_norm import skip_layer_norm
from fuser.patterns.skip_rms_norm import skip_rms_norm

# In the order they are tried: a LayerNorm contains an RMSNorm of the centered input, and the later ones are made of
# the earlier ones' nodes.
ALL: tuple[FusedOp, ...] = (
    attention_mask,
    rotary_table,
    position_ids,
    fake_quantize,
    layer_norm,
    rms_norm,
    skip_layer_norm,
    skip_rms_norm,
    silu,
    gelu,
    gelu_tanh,
    gated_mlp,
    packed_linear,
    rotary,
    attention,
    cache_write,
    rotary_cache_write,
)

__all__ = ["ALL"]

"""A test beside each emitted kernel: it draws inputs, runs the kernel, and compares with what it computes, written out.

The text stands for itself: it imports torch, triton and the kernel beside it, and holds the definition in float64.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fuser.codegen.attention import Attention
from fuser.codegen.elementwise import Elementwise
from fuser.codegen.embedding import Embedding
from fuser.codegen.kernel import Kernel
from fuser.codegen.linear import Linear
from fuser.codegen.matmul import Matmul
from fuser.codegen.rotary import Rotary
from fuser.codegen.stubs import attention, linear, rows
from fuser.codegen.stubs.parts import Parts, written

FAMILIES: Mapping[type, Callable[[Any, Kernel], Parts]] = {
    Linear: linear.linear,
    Matmul: linear.linear,
    Rotary: linear.rotary,
    Attention: attention.attention,
    Elementwise: rows.elementwise,
    Embedding: rows.embedding,
}


def stub(name: str, kernel: Kernel, what: Any) -> str | None:
    """The test of `kernel`, which stands in the module `name` and computes `what`; None for a family without definition."""
    parts = FAMILIES.get(type(what))
    return written(name, kernel, what.dtype, parts(what, kernel)) if parts is not None else None

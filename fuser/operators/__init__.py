"""What each plain ONNX operator computes, in torch."""

from fuser.operators import (  # noqa: F401  importing a module enters its operators in the table
    attention,
    contractions,
    contrib,
    contrib_attention,
    creation,
    elementwise,
    indexing,
    normalization,
    quantization,
    reductions,
    shapes,
)
from fuser.operators.table import default, evaluate, supported

__all__ = ["default", "evaluate", "supported"]

"""Shape, type and content inference: what is known about every value before anything runs.

One rule an operator gives the outputs' dtypes and shapes over symbolic dims. Small integer tensors are followed as
well (`fuser.content`), so that what an exporter computes with Shape, Gather and Concat is known as dims. Operators
outside the table fall back to ONNX's own inference, and beyond that stay unknown, which is always safe.
"""

from fuser.shapes import contractions, elementwise, structure  # noqa: F401  importing a module enters its rules
from fuser.shapes.structure import quotient
from fuser.shapes.table import RULES, Inferred, axis_of, broadcast, infer, infer_node

__all__ = ["RULES", "Inferred", "axis_of", "broadcast", "infer", "infer_node", "quotient"]

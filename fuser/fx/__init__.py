"""From a PyTorch module, by way of `torch.export`, to a Graph: no ONNX in between."""

from fuser.fx.export import evaluating, export_module
from fuser.fx.importer import import_program

__all__ = ["evaluating", "export_module", "import_program"]

"""The command: `fuse model.onnx -o fused.onnx`, and those beside it: `fuse explain model.onnx`."""

from fuser.cli import fusing, diffing, kernels, running  # noqa: I001  each registers its commands, in the order of the help
from fuser.cli.console import Progress, app

__all__ = ["Progress", "app", "diffing", "fusing", "kernels", "main", "running"]


def main() -> None:
    """The console entry point."""
    app()

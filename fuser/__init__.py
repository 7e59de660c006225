"""fuser: find the transformer in an exported graph, fuse it, prove every rewrite."""

__version__ = "0.1.0"

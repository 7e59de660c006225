"""The exceptions fuser raises; every one is a FuserError."""


class FuserError(Exception):
    """What went wrong, with what was wanted, what was found and where."""


class UnsupportedOperator(FuserError):  # noqa: N818
    """An operator, or a form of it (an attribute, a dtype), that the operator table does not define."""

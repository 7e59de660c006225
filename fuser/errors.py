"""The errors a user can meet: one tree, each with the exit code the command returns for it."""


class FuserError(Exception):
    """Anything fuser refuses or fails to do; the text says what was wanted, what was found and where."""

    exit_code = 1


class UsageError(FuserError):
    """The call itself is wrong: an unknown target, an unknown dim, an output that is the input."""

    exit_code = 2


class InputError(FuserError):
    """The model cannot be read, or says something fuser does not support."""

    exit_code = 3


class UnsupportedOperator(InputError):
    """An operator, or a form of one, that is outside the table of `fuser.operators`."""


class VerificationError(FuserError):
    """The fused model and the original disagree; nothing has been written."""

    exit_code = 4


class ExpectationError(FuserError):
    """`--expect` or `--strict` was not met."""

    exit_code = 5


class OutputError(FuserError):
    """The result could not be written; what stood at the target is untouched."""

"""What can go wrong, and the exit code that each kind ends the command line with."""


class PlacerError(Exception):
    """Base of every error that placer raises on purpose: one line that says what, expected, where."""

    exit_code = 1


class InvalidInput(PlacerError, ValueError):
    """A file, an option or an argument that cannot be used as it is (exit code 2)."""

    exit_code = 2


class Infeasible(PlacerError):
    """No placement can exist; the message names the capacity that is short (exit code 3)."""

    exit_code = 3


class NoPlacement(PlacerError):
    """The search was stopped before it had any placement (exit code 4)."""

    exit_code = 4


class GateFailed(PlacerError):
    """A ``--require`` condition does not hold (exit code 5)."""

    exit_code = 5

"""What is raised when it is not our fault, and the check that two modules share."""

from collections.abc import Sequence


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the wrong value and what would be accepted. The command line
    prints it and exits with code 2; anything else that is raised is our own fault and keeps its traceback.

    >>> raise InputError("steps -5: want an integer of at least 1")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: steps -5: want an integer of at least 1
    """


class Stopped(RuntimeError):
    """A run cannot go on: the loss is not finite, the disk is full. One line; the command line exits with 1."""


def not_installed(package: str, extra: str) -> InputError:
    """The error for a package that an extra of this distribution brings.

    >>> str(not_installed("matplotlib", "plots"))
    "matplotlib is not installed; want `pip install 'ddpm-kit[plots]'`"
    """
    return InputError(f"{package} is not installed; want `pip install 'ddpm-kit[{extra}]'`")


def check_size(size: Sequence[int], levels: int) -> None:
    """InputError where H or W does not divide by 2^(levels - 1), naming the nearest sizes that do.

    >>> check_size((30, 32), 4)
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: size 30x32: 30 does not divide by 8, as 4 levels need; the nearest that do are 24 and 32
    """
    factor = 2 ** (levels - 1)
    for side in size:
        if side < 1 or side % factor:
            below, above = side // factor * factor, (side // factor + 1) * factor
            nearest = (
                f"the nearest that do are {below} and {above}" if below > 0 else f"the smallest that does is {factor}"
            )
            raise InputError(
                f"size {size[0]}x{size[1]}: {side} does not divide by {factor}, as {levels} levels need; {nearest}"
            )

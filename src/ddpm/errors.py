"""The errors that users see, and a check of image sizes that several modules share."""

from collections.abc import Sequence


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one line that names the wrong value and the values that are accepted. The command line prints it and
    exits with code 2. Any other exception is a bug of this package and keeps its traceback.

    >>> raise InputError("steps -5: want an integer of at least 1")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: steps -5: want an integer of at least 1
    """


class Stopped(RuntimeError):
    """A run cannot go on: the loss is not finite or the disk is full. The command line prints it and exits with 1."""


def not_installed(package: str, extra: str) -> InputError:
    """The error for a missing package that one of this distribution's extras installs.

    >>> str(not_installed("matplotlib", "plots"))
    "matplotlib is not installed; want `pip install 'ddpm-kit[plots]'`"
    """
    return InputError(f"{package} is not installed; want `pip install 'ddpm-kit[{extra}]'`")


def check_size(size: Sequence[int], levels: int) -> None:
    """Raise InputError unless H and W are divisible by 2^(levels - 1); the message names the nearest sizes that are.

    >>> check_size((30, 32), 4)
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: size 30x32: 30 is not divisible by 8, which 4 levels need; the nearest are 24 and 32
    """
    factor = 2 ** (levels - 1)
    for side in size:
        if side < 1 or side % factor:
            below, above = side // factor * factor, (side // factor + 1) * factor
            nearest = f"the nearest are {below} and {above}" if below > 0 else f"the smallest is {factor}"
            raise InputError(
                f"size {size[0]}x{size[1]}: {side} is not divisible by {factor}, which {levels} levels need; {nearest}"
            )

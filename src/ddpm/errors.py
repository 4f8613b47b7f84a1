"""The errors that users see, and the checks of arguments that several modules share."""

import difflib
import json
import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any


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


def one_line(text: str) -> str:
    r"""The text with line breaks and other control characters escaped, as file names may have them.

    >>> one_line("a\nb.png: damaged")
    'a\\nb.png: damaged'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(fault: BaseException) -> str:
    r"""The message of an exception on one line of at most 200 characters; the exception's type if it has no message.

    >>> brief(ValueError("two\nlines")), brief(EOFError())
    ('two lines', 'EOFError')
    """
    return " ".join(str(fault).split())[:200] or type(fault).__name__


def not_installed(package: str, extra: str) -> InputError:
    """The error for a missing package that one of this distribution's extras installs.

    >>> str(not_installed("matplotlib", "plots"))
    "matplotlib is not installed; want `pip install 'ddpm-kit[plots]'`"
    """
    return InputError(f"{package} is not installed; want `pip install 'ddpm-kit[{extra}]'`")


def suggestion(name: object, names: Iterable[object]) -> str:
    """`did you mean NEAREST? `, or nothing if no name is near.

    >>> suggestion("cifra10", ["cifar10", "digits"])
    'did you mean cifar10? '
    """
    by_lower = {str(one).lower(): one for one in names}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]}? " if near else ""


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


def is_scalar(value: Any) -> bool:
    """Whether `value` is one number of Python, NumPy or torch, and no sequence or array of them.

    >>> import numpy as np
    >>> is_scalar(3), is_scalar(np.int64(3)), is_scalar([3]), is_scalar(np.array([3]))
    (True, True, False, False)
    """
    return getattr(value, "ndim", 0) == 0 and not isinstance(value, (Sequence, range))


def whole_number(name: str, value: Any, least: float | None = None, most: float | None = None) -> int:
    """Return a whole number of Python, NumPy or torch as an int. Raises InputError for anything else, and out of range.

    >>> import numpy as np
    >>> whole_number("steps", np.int64(5), 1)
    5
    >>> whole_number("steps", 0.5, 1, 10)
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: steps 0.5: want a whole number, 1 to 10
    """
    try:
        number = None if isinstance(value, bool) or not is_scalar(value) else operator.index(value)
    except (TypeError, RuntimeError):  # torch raises either for what is no whole number
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise InputError(f"{name} {_shown(value)}: want a whole number{_range(number, least, most)}")
    return number


def finite_number(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """Return a finite number of Python, NumPy or torch as a float. Raises InputError for anything else.

    >>> import numpy as np
    >>> finite_number("eta", np.float32(0.5), 0, 1), finite_number("eta", 1, 0, 1)
    (0.5, 1.0)
    """
    try:
        number = None if isinstance(value, (bool, str)) or not is_scalar(value) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    outside = number is None or (least is not None and number < least) or (most is not None and number > most)
    if number is None or outside or not math.isfinite(number):
        raise InputError(f"{name} {_shown(value)}: want a finite number{_range(number, least, most)}")
    return number


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def byte_count(name: str, value: Any) -> int:
    """Return a number of bytes as an int. Text may end in K, M, G or T, powers of 1024. Raises InputError otherwise.

    >>> byte_count("cache_bytes", "4G") == 4 * 2**30, byte_count("cache_bytes", "1.5K"), byte_count("cache_bytes", 7)
    (True, 1536, 7)
    >>> byte_count("cache_bytes", "4 apples")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: cache_bytes '4 apples': want a number of bytes, as 4G, 500M or 0
    """
    if not isinstance(value, str):
        return whole_number(name, value, 0, 2**62)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
    count = float(match[1]) * _UNITS[match[2].upper()] if match else math.inf
    if count > 2**62:
        raise InputError(f"{name} {_shown(value)}: want a number of bytes, as 4G, 500M or 0")
    return int(count)


def _shown(value: Any) -> str:
    """A value in a message: its number if it is one, and what Python shows otherwise; at most a line."""
    text = repr(value.item() if is_scalar(value) and hasattr(value, "item") else value)
    return " ".join(text.split())[:80]


def _range(number: float | None, least: float | None, most: float | None) -> str:
    """The values that are accepted, in words. A limit of a million or more is named only if it was passed."""
    above = number is not None and most is not None and number > most
    if most is not None and (most < 1_000_000 or above):
        return f" of at most {most}" if least is None or most >= 1_000_000 else f", {least} to {most}"
    return "" if least is None else f" of at least {least}"


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON text from outside.

    Raises ValueError for other text, and for values nested more than 100 deep, which would end in a RecursionError at
    one place or another.

    >>> parse_json('{"step": 3}')
    {'step': 3}
    >>> parse_json("[" * 1000)
    Traceback (most recent call last):
    ...
    ValueError: its values are nested more than 100 deep
    """
    too_deep = "its values are nested more than 100 deep"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(101):
        level = [v for v in level if isinstance(v, (dict, list))]
        if not level:
            return value
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    raise ValueError(too_deep)

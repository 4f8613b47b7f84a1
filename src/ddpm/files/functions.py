"""Functions of the user's own, which an option names as FILE.py:NAME."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm.errors import InputError, brief


def load(spec: str) -> Callable[..., Any]:
    """The function FILE.py:NAME. The file is run, so the user must trust it.

    An error in a call of the function is raised as an InputError that names `spec`. Raises InputError for another form
    of `spec`, if there is no such file or no such function, and if the file cannot be imported.

    >>> load("features.py")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: features.py: want FILE.py:function
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"{spec}: want FILE.py:function")
    if not path.is_file():
        raise InputError(f"{spec}: no such file {path}, want FILE.py:function")
    title = f"ddpm_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(title, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[title] = module  # dataclasses look their module up
    if (folder := str(path.absolute().parent)) not in sys.path:
        sys.path.append(folder)  # the file may import its neighbours; at the end they hide no other module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as fault:
        raise InputError(f"{path}: cannot be imported ({type(fault).__name__}: {brief(fault)})") from fault
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == title]
        raise InputError(f"{spec}: no function {name}, {path} has {', '.join(sorted(functions)) or 'none'}")

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as fault:
            raise InputError(f"{spec}: {type(fault).__name__}: {brief(fault)}") from fault

    return call

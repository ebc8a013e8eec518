"""Packages of the extras: imported on use, with a message that names the extra."""

import importlib
from typing import Any


def need(module: str, package: str, extra: str = "experiments") -> Any:
    """Imports a module, or says how to install its package.

    Args:
        module: The module's name.
        package: The package's name, for the message.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: If the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this needs {package}: pip install "unrollgrad[{extra}]"') from error


def console() -> Any:
    """Makes a rich console; if it is not a terminal, it is wide enough for our tables."""
    console = need("rich.console", "rich").Console()
    if not console.is_terminal:
        console.width = 120
    return console

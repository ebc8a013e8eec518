"""What comes with the ``experiments`` extra: imported on use, with a message that names it."""

import importlib
from typing import Any


def need(module: str, package: str) -> Any:
    """Imports a module, or says how to install its package.

    Raises:
        ImportError: If it is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this needs {package}: pip install "unrollgrad[experiments]"') from error


def console() -> Any:
    """A rich console, wide enough for our tables where nobody watches."""
    console = need("rich.console", "rich").Console()
    if not console.is_terminal:
        console.width = 120
    return console

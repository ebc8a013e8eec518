"""Experiments: one file per figure or table; ``python -m experiments --help``."""

import importlib.util

_EXTRA = ("flax", "matplotlib", "orbax", "rich", "sklearn", "tyro")


def _missing() -> list[str]:
    """The packages of the extra that are not installed."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ValueError:  # it is hidden: sys.modules has None for it
            return False

    return [name for name in _EXTRA if not found(name)]


if missing := _missing():
    raise ImportError(
        f"the experiments need {', '.join(missing)}: "
        'pip install -e ".[experiments]" in the repository'
    )

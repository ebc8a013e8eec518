"""Whole experiments are slow tests: the quick suite has what they all run on, and training."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUICK = {"test_framework.py", "test_train.py"}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)

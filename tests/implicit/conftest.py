"""Implicit differentiation is tested in double precision, against closed forms."""

import jax
import pytest


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield

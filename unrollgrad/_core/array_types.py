"""User code on perturbed leaves that are not plain arrays: quax carries them through it.

quax is needed only where such leaves are, and whoever makes them imports it.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

from unrollgrad._core.optional_packages import need
from unrollgrad.types import Theta, UnrolledProblem


def understood(problem: UnrolledProblem, theta: Theta) -> UnrolledProblem:
    """Returns the problem whose functions take this theta, whatever types its leaves have.

    They return plain arrays: what is left of another type in a state is materialised.
    """
    quax = sys.modules.get("quax")
    if quax is None or not any(isinstance(x, quax.Value) for x in _leaves(quax, theta)):
        return problem
    plain = functools.partial(_plain, quax)
    evaluate = problem.evaluate and plain(problem.evaluate)
    return problem._replace(init=plain(problem.init), step=plain(problem.step), evaluate=evaluate)


def through(function: Callable) -> Callable:
    """The function, which takes leaves of other types and returns plain arrays.

    Raises:
        ImportError: If quax is not installed; the message names the extra.
    """
    return _plain(need("quax", "quax", "lowrank"), function)


def _plain(quax: Any, function: Callable) -> Callable:
    through = quax.quaxify(function)

    def call(*args):
        leaves, structure = jax.tree.flatten(
            through(*args), is_leaf=lambda x: isinstance(x, quax.Value)
        )
        return structure.unflatten(
            x.materialise() if isinstance(x, quax.Value) else x for x in leaves
        )

    return call


def _leaves(quax: Any, tree: Theta) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, quax.Value))

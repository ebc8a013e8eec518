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

    Raises:
        NotImplementedError: In a function, if it calls one with a rule by ``jax.custom_vjp``.
    """
    quax = sys.modules.get("quax")
    if quax is None or not any(isinstance(x, quax.Value) for x in _leaves(quax, theta)):
        return problem
    plain = functools.partial(_plain, quax, "ug.noise.gaussian(), for example")
    evaluate = problem.evaluate and plain("evaluate", problem.evaluate)
    init, step = plain("init", problem.init), plain("step", problem.step)
    return problem._replace(init=init, step=step, evaluate=evaluate)


def through(function: Callable, dense: str) -> Callable:
    """The function, which takes leaves of other types and returns plain arrays.

    Args:
        function: The function, a loss.
        dense: How to do without such leaves, for the error.

    Raises:
        ImportError: If quax is not installed; the message names the extra.
    """
    return _plain(need("quax", "quax", "lowrank"), dense, "loss", function)


def _plain(quax: Any, dense: str, name: str, function: Callable) -> Callable:
    through = quax.quaxify(function)

    def call(*args):
        try:
            out = through(*args)
        except NotImplementedError as error:
            if "custom_vjp" not in str(error):
                raise
            names = [f"theta{x.name}" for x in _leaves(quax, args) if hasattr(x, "name")]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise NotImplementedError(
                f"`{name}` calls a function whose derivative is given by jax.custom_vjp. quax, "
                f"which carries perturbations of {', '.join(names[:3]) or 'weights'}{more} through "
                "your code, cannot run such a function. Give the derivative by jax.custom_jvp, "
                f"which it can, or use dense perturbations: {dense}."
            ) from error
        leaves, structure = jax.tree.flatten(out, is_leaf=lambda x: isinstance(x, quax.Value))
        return structure.unflatten(
            x.materialise() if isinstance(x, quax.Value) else x for x in leaves
        )

    return call


def _leaves(quax: Any, tree: Theta) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, quax.Value))

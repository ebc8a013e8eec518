"""Which leaves of theta can influence the loss: reachability in the traced program.

A gradient of zero is a result; a leaf from which no data flows to any loss is a mistake. JAX's
dead-code elimination says which inputs of a step its losses need. A leaf of the state that is read
was written by the step before, so its new value counts as a loss too, until nothing is added. An
equation without a rule, or with a derivative rule of its own (which may use what the value does
not), needs all of its inputs, so a leaf that is reported is certainly dead; one that is not may be.
"""

import warnings
from typing import TYPE_CHECKING

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from unrollgrad.types import Theta

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr  # takes long to import


def check_theta(theta: Theta, init: "ClosedJaxpr", step: "ClosedJaxpr") -> None:
    """Warns about the leaves of theta that cannot influence the loss.

    Args:
        theta: Outer parameters.
        init: The program of ``init``, from ``inner_loop.check_step``.
        step: The program of a step, from there too.

    Raises:
        ValueError: If no leaf can.
    """
    named = jax.tree_util.tree_leaves_with_path(theta)
    dead = [
        f"theta{jax.tree_util.keystr(path)}"
        for (path, _), live in zip(named, _reaching(init, step), strict=True)
        if not live
    ]
    if not dead:
        return
    reason = (
        "no data flows to a loss through `init`, `step` or `evaluate`, so that the true gradient "
        "is zero (what evolution strategies return is noise). Usual causes: a schedule that "
        "overwrites an injected hyperparameter, as in "
        "optax.inject_hyperparams(optax.sgd)(learning_rate=schedule), or an optimizer or loss that "
        "ignores it. Build the optimizer from theta in every step, such as "
        "`lambda theta, t: optax.sgd(theta['lr'] * schedule(t))`"
    )
    if len(dead) == len(named):
        raise ValueError(f"no leaf of `theta` can influence the loss: {reason}.")
    names = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
    warnings.warn(
        f"{names} cannot influence the loss: {reason}; or take it out of theta.", stacklevel=2
    )


def _reaching(init: "ClosedJaxpr", step: "ClosedJaxpr") -> list[bool]:
    """Returns which leaves of theta reach a loss."""
    num_state, num_theta = len(init.out_avals), len(init.in_avals) - 1  # `init` takes the key, too
    losses = [True] * (len(step.out_avals) - num_state)
    read = [False] * num_state
    while True:
        _, used = dce_jaxpr(step.jaxpr, [*read, *losses])
        more = [a or b for a, b in zip(read, used[:num_state], strict=True)]
        if more == read:
            break
        read = more
    in_step = used[num_state : num_state + num_theta]
    in_init = dce_jaxpr(init.jaxpr, read)[1][1:]
    return [a or b for a, b in zip(in_step, in_init, strict=True)]

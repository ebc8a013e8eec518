"""Which leaves of theta can influence the loss: reachability in the traced program.

A gradient of zero is a result; a leaf from which no data flows to any loss is a mistake. The trace
of one step is walked backwards from the losses. A leaf of the state that is read was written by the
step before, so its new value counts as a loss too, until nothing is added. Where a primitive is not
known, each of its outputs is taken to depend on all its inputs: a leaf that is reported is
certainly dead, one that is not may be.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from unrollgrad.types import Theta

# Calls whose inner program has their inputs and outputs, one to one. Custom derivative rules are
# not among them: a rule may use an input that the value does not (a straight-through estimator).
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr"}


def check_theta(theta: Theta, trace: Any, num_state: int) -> None:
    """Warns of the leaves of theta that cannot influence the loss.

    Args:
        theta: Outer parameters.
        trace: That of a step, as ``problem_checks.check_step`` returns it.
        num_state: Leaves in the inner state.

    Raises:
        ValueError: If no leaf can.
    """
    named = jax.tree_util.tree_leaves_with_path(theta)
    alive = _reaching(trace, num_state)[1 : 1 + len(named)]  # the key is in front
    dead = [
        f"theta{jax.tree_util.keystr(path)}"
        for (path, _), live in zip(named, alive, strict=True)
        if not live
    ]
    if not dead:
        return
    which = "no leaf of `theta`" if len(dead) == len(named) else _listed(dead)
    reason = (
        "no data flows to a loss through `init`, `step` or `evaluate`, so that the true gradient "
        "is zero (what evolution strategies return is noise). Usual causes: a schedule that "
        "overwrites an injected hyperparameter, as in "
        "optax.inject_hyperparams(optax.sgd)(learning_rate=schedule), or an optimizer or loss that "
        "ignores it. Build the optimizer from theta in every step, such as "
        "`lambda theta, t: optax.sgd(theta['lr'] * schedule(t))`"
    )
    if len(dead) == len(named):
        raise ValueError(f"{which} can influence the loss: {reason}.")
    warnings.warn(
        f"{which} cannot influence the loss: {reason}; or take it out of theta.", stacklevel=2
    )


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


def _reaching(trace: Any, num_state: int) -> list[bool]:
    """Which inputs reach a loss; the outputs are the state before, the state after, the losses."""
    jaxpr = _open(trace)
    before = jaxpr.outvars[:num_state]
    live_after = [False] * num_state
    losses = [True] * (len(jaxpr.outvars) - 2 * num_state)
    while True:
        live = _live(jaxpr, [False] * num_state + live_after + losses)
        more = [a or v in live for a, v in zip(live_after, before, strict=True)]
        if more == live_after:
            return [v in live for v in jaxpr.invars]
        live_after = more


def _open(jaxpr: Any) -> Any:
    """The program without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _live(jaxpr: Any, outputs: Sequence[bool]) -> set:
    """The variables of a program on which one of the live outputs depends."""
    live = _variables(jaxpr.outvars, outputs)
    for eqn in reversed(jaxpr.eqns):
        here = [v in live for v in eqn.outvars]
        if any(here) or eqn.effects:
            live |= _variables(eqn.invars, _needed(eqn, here))
    return live


def _variables(atoms: Sequence[Any], chosen: Sequence[bool]) -> set:
    """The chosen ones that are variables, not literals."""
    pairs = zip(atoms, chosen, strict=True)
    return {v for v, is_chosen in pairs if is_chosen and not isinstance(v, core.Literal)}


def _live_inputs(jaxpr: Any, outputs: Sequence[bool]) -> list[bool]:
    jaxpr = _open(jaxpr)
    live = _live(jaxpr, outputs)
    return [v in live for v in jaxpr.invars]


def _needed(eqn: Any, outputs: list[bool]) -> list[bool]:
    """Which inputs of an equation its live outputs depend on."""
    name, everything = eqn.primitive.name, [True] * len(eqn.invars)
    if eqn.effects:
        return everything  # what it writes (a mutable array) may be read elsewhere
    if name == "optimization_barrier":
        return outputs
    if name in _CALLS and _CALLS[name] in eqn.params:
        inner = eqn.params[_CALLS[name]]
        return _live_inputs(inner, outputs) if _fits(inner, eqn.invars, outputs) else everything
    if name == "cond":
        operands = eqn.invars[1:]
        if not all(_fits(branch, operands, outputs) for branch in eqn.params["branches"]):
            return everything
        each = [_live_inputs(branch, outputs) for branch in eqn.params["branches"]]
        return [True, *map(any, zip(*each, strict=True))]
    if name == "scan" and (counts := _scan_counts(eqn.params)):
        return _needed_by_scan(eqn, outputs, *counts)
    return everything


def _fits(jaxpr: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
    jaxpr = _open(jaxpr)
    return len(jaxpr.invars) == len(inputs) and len(jaxpr.outvars) == len(outputs)


def _scan_counts(params: Any) -> tuple[int, int] | None:
    """How many constants and carries a scan has; None if a new jax says it in another way."""
    if "num_consts" in params and "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    try:
        consts, carry, _ = params["ft_in"].unpack()  # jax 0.12
        return len(consts), len(carry)
    except (KeyError, AttributeError, TypeError, ValueError):
        return None


def _needed_by_scan(eqn: Any, outputs: list[bool], consts: int, carries: int) -> list[bool]:
    """The fixed point over the carry: what the next turn reads, this one must write."""
    live = outputs
    while True:
        inputs = _live_inputs(eqn.params["jaxpr"], live)
        read = inputs[consts : consts + carries]
        carry = [a or b for a, b in zip(read, live[:carries], strict=True)]
        if carry == live[:carries]:  # a carry that is live begins with its initial value
            return [*inputs[:consts], *carry, *inputs[consts + carries :]]
        live = [*carry, *live[carries:]]

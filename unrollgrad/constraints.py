"""Hyperparameters that must be positive, or between bounds, as an unconstrained theta.

An outer optimizer may reach any real number, but a learning rate must be positive. A ``Constraint``
is a pair of pure functions between the two. Keep the unconstrained numbers as theta and call
``constrain`` inside ``init``, ``step`` or ``optimizer``. Everything about theta is then in
unconstrained units: gradients, outer learning rate and ``sigma`` of evolution strategies. With
``positive``, sigma = 0.1 perturbs a learning rate by about 10 %; with ``unit_interval`` it moves
0.5 by 0.025 and 0.99 by 0.001.

    positive          0 < value < inf       value = exp(theta)
    unit_interval     0 < value < 1         value = sigmoid(theta)
    box(low, high)    low < value < high    value = low + (high - low) sigmoid(theta)
    free              any finite number     value = theta

For another constraint write ``Constraint(name, domain, to_value, to_theta)``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from unrollgrad._checks import arguments
from unrollgrad._core import optional_packages
from unrollgrad.types import Theta

__all__ = [
    "Constraint",
    "box",
    "constrain",
    "free",
    "positive",
    "report",
    "table",
    "unconstrain",
    "unit_interval",
]


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A pair of pure, elementwise functions; for ``jax.tree`` it is a leaf.

    Attributes:
        name: Shown in reports and errors.
        domain: The allowed values, in words, such as ``"0 < value < 1"``.
        to_value: Maps any real number into the domain.
        to_theta: Inverse of ``to_value``; not finite outside the domain and at its boundary.
    """

    name: str
    domain: str
    to_value: Callable[[jax.Array], jax.Array]
    to_theta: Callable[[jax.Array], jax.Array]


def box(low: float, high: float) -> Constraint:
    """Values between two bounds.

    The value is computed from the nearer bound, so that rounding never carries it beyond a bound
    and its derivative (high - low) s (1 - s), with s = sigmoid(theta), is accurate on both sides.

    Args:
        low: The lower bound, excluded.
        high: The upper bound, excluded; it must differ from ``low`` in the dtype of theta.

    Raises:
        ValueError: If the bounds are not finite numbers with low < high.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"`low` and `high` must be finite with low < high; got low={low}, high={high}. "
            "Swap them, or use `positive` or `free` where there is no bound."
        )

    def part(theta: jax.Array) -> jax.Array:
        return (high - low) * jax.nn.sigmoid(theta)

    def to_value(theta: jax.Array) -> jax.Array:
        return jnp.where(theta < 0, low + part(theta), high - part(-theta))

    def to_theta(value: jax.Array) -> jax.Array:
        return jnp.log(value - low) - jnp.log(high - value)

    name, domain = f"box({low:g}, {high:g})", f"{low:g} < value < {high:g}"
    return Constraint(name, domain, to_value, to_theta)


positive = Constraint("positive", "0 < value < inf", jnp.exp, jnp.log)
unit_interval = dataclasses.replace(box(0.0, 1.0), name="unit_interval")
free = Constraint("free", "any finite number", lambda theta: theta, lambda value: value)


def constrain(constraints: object, theta: Theta) -> Any:
    """The tree of values that an unconstrained theta represents.

    Pure and elementwise, in theta's dtypes, under ``jit``, ``vmap`` and derivatives in both modes;
    a derivative is finite wherever the value is. ``positive`` overflows to inf beyond theta = 88 in
    float32.

    Args:
        constraints: A pytree prefix of theta with a ``Constraint`` at every leaf.
        theta: Unconstrained numbers, any pytree of floating arrays.

    Raises:
        TypeError: If a leaf of ``constraints`` is not a ``Constraint``, or theta is not floating.
        ValueError: If ``constraints`` is not a prefix of theta.

    Example:
        >>> from unrollgrad.constraints import constrain, positive, unconstrain, unit_interval
        >>> kinds = {"rate": positive, "momentum": unit_interval}
        >>> theta = unconstrain(kinds, {"rate": 0.1, "momentum": 0.9})
        >>> {name: round(float(x), 2) for name, x in theta.items()}
        {'momentum': 2.2, 'rate': -2.3}
        >>> {name: round(float(x), 2) for name, x in constrain(kinds, theta).items()}
        {'momentum': 0.9, 'rate': 0.1}
    """
    theta = arguments.floating_theta(theta)
    full = _broadcast(constraints, theta, "theta")
    return jax.tree.map(lambda constraint, x: constraint.to_value(x), full, theta)


def unconstrain(constraints: object, values: object) -> Any:
    """The theta that represents ``values``: the inverse of ``constrain``.

    ``constrain(constraints, unconstrain(constraints, values))`` is ``values`` up to rounding theta:
    an error of about max(1, |theta|) units in the last place (of the larger bound, with ``box``).

    Args:
        constraints: A pytree prefix of ``values`` with a ``Constraint`` at every leaf.
        values: Any pytree of numbers. Floating arrays keep their dtypes; Python numbers and integer
            arrays become float32.

    Raises:
        TypeError: If a leaf of ``constraints`` is not a ``Constraint``, or a value not real.
        ValueError: If ``constraints`` is not a prefix of ``values``, or a value lies outside its
            constraint's domain or, in its dtype, at the boundary. Values that are traced by a JAX
            transformation are not checked and give NaN or infinity.
    """
    full = _broadcast(constraints, values, "values")

    def leaf(path, constraint, value):
        if isinstance(value, jax.core.Tracer):
            return constraint.to_theta(_floating(path, value))
        with jax.ensure_compile_time_eval():  # so that constants are checked inside jit, too
            value = _floating(path, value)
            theta = constraint.to_theta(value)
        allowed = np.isfinite(np.asarray(theta, np.float64))
        if not allowed.all():
            first = np.asarray(value)[~allowed][0]
            raise ValueError(
                f"values{jax.tree_util.keystr(path)} must be in the domain of "
                f"`{constraint.name}`, {constraint.domain}; got {first} as {value.dtype}"
                f"{f' ({np.sum(~allowed)} of {allowed.size} values)' if allowed.size > 1 else ''}. "
                "Move it inside, away from the boundary, or choose another constraint."
            )
        return theta

    return jax.tree_util.tree_map_with_path(leaf, full, values)


def report(constraints: object, theta: Theta) -> list[dict[str, Any]]:
    """Theta in both units, for a log or a table; arguments and errors as in ``constrain``.

    Returns:
        One dict per leaf with ``leaf`` (its path), ``constraint`` (its name), ``theta`` and
        ``value``: floats, or nested lists of floats for an array. Theta must not be traced.

    Example:
        >>> from unrollgrad import constraints
        >>> constraints.report({"rate": constraints.positive}, {"rate": 0.0})
        [{'leaf': "['rate']", 'constraint': 'positive', 'theta': 0.0, 'value': 1.0}]
    """
    theta = arguments.floating_theta(theta)
    full = _broadcast(constraints, theta, "theta")
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    return [
        {
            "leaf": jax.tree_util.keystr(path),
            "constraint": constraint.name,
            "theta": np.asarray(x, np.float64).tolist(),
            "value": np.asarray(constraint.to_value(x), np.float64).tolist(),
        }
        for (path, x), constraint in zip(leaves, jax.tree.leaves(full), strict=True)
    ]


def table(constraints: object, theta: Theta) -> None:
    """Prints ``report``. Needs rich (``pip install "unrollgrad[experiments]"``)."""
    console = optional_packages.console()
    rows = report(constraints, theta)
    box = optional_packages.need("rich.box", "rich").SIMPLE_HEAD
    make = optional_packages.need("rich.table", "rich").Table
    shown = make(box=box, show_edge=False, padding=(0, 1, 0, 0))
    for column in rows[0]:
        shown.add_column(column, justify="right" if column in ("theta", "value") else "left")
    for row in rows:
        numbers = (np.array2string(np.asarray(row[k]), precision=4) for k in ("theta", "value"))
        shown.add_row(row["leaf"] or ".", row["constraint"], *numbers)
    console.print(shown)


def _broadcast(constraints, tree: object, name: str):
    """A ``Constraint`` for every leaf of ``tree``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(constraints):
        if not isinstance(leaf, Constraint):
            raise TypeError(
                f"constraints{jax.tree_util.keystr(path)} must be a Constraint; got "
                f"{arguments.describe(leaf)}. Use `positive`, `unit_interval`, `box(low, high)` or "
                "`free` of unrollgrad.constraints."
            )
    try:
        return jax.tree.broadcast(constraints, tree)
    except ValueError as error:
        raise ValueError(
            f"`constraints` must be a Constraint or a pytree prefix of {name}; got structure "
            f"{jax.tree.structure(constraints)} for {name} of structure "
            f"{jax.tree.structure(tree)}. Name every leaf, with `free` where any number will do."
        ) from error


def _floating(path: tuple, value: ArrayLike) -> jax.Array:
    """``value`` as an array of its own floating dtype, or float32."""
    dtype = arguments.dtype_of(value)
    if jnp.issubdtype(dtype, jnp.floating) and hasattr(value, "dtype"):
        return arguments.strong(value)
    if jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(value, jnp.float32)
    raise TypeError(
        f"values{jax.tree_util.keystr(path)} must be a real number or an array of them; got "
        f"{arguments.describe(value)}."
    )

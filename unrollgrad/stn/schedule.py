"""The schedule of hyperparameters that a self-tuning network found, in their own units."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad import constraints as ug_constraints
from unrollgrad._checks import arguments
from unrollgrad._core import optional_packages
from unrollgrad.types import Theta

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Schedule", "schedule"]

_MOST_LINES = 12


class Schedule(NamedTuple):
    """Hyperparameters call by call; every array has the calls along its leading axis.

    Attributes:
        values: The hyperparameters in their own units, a tree like theta.
        theta: The unconstrained ones.
        sigma: The standard deviations of their perturbations, in theta's units.
        loss: The validation loss.
        steps: The training steps done before each call.
    """

    values: Any
    theta: Any
    sigma: Any
    loss: np.ndarray
    steps: np.ndarray

    def at(self, step: Any) -> Any:
        """The values in force at a training step, to replay the schedule in another training."""
        call = jnp.searchsorted(jnp.asarray(self.steps), jnp.asarray(step), side="right") - 1
        return jax.tree.map(lambda x: jnp.asarray(x)[jnp.maximum(call, 0)], self.values)

    def plot(self) -> "Figure":
        """Draws every hyperparameter over the training steps, and the validation loss below.

        Of many numbers the first twelve are drawn. Needs matplotlib.
        """
        lines = _lines(self)
        make = optional_packages.need("matplotlib.figure", "matplotlib").Figure
        height = 1.4 + 1.5 * (len(lines) + 1)
        figure = make(figsize=(8.0, height), layout="constrained")
        axes = figure.subplots(len(lines) + 1, 1, sharex=True, squeeze=False)[:, 0]
        for axis, (name, values) in zip(axes, lines, strict=False):
            axis.plot(self.steps, values, color="C0")
            axis.set_ylabel(name, rotation=0, ha="right", va="center")
            axis.margins(y=0.15)
        axes[-1].plot(self.steps, self.loss, color="C3", linewidth=0.8)
        axes[-1].set_ylabel("validation\nloss", rotation=0, ha="right", va="center")
        axes[-1].set_xlabel("training steps")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        return figure


def schedule(
    history: Mapping[str, np.ndarray],
    theta: Theta,
    constraints: Any = ug_constraints.free,
) -> Schedule:
    """The schedule that a run of ``delta_stn`` or ``stn`` by ``ug.fit`` found.

    Args:
        history: ``FitResult.history``.
        theta: Some theta of the run, such as ``FitResult.theta``, for its structure.
        constraints: The ``Constraint`` of every hyperparameter, a pytree prefix of theta; without
            them the values are theta itself.

    Raises:
        ValueError: If the history is another estimator's, or theta has another size.

    Example:
        >>> import numpy as np, unrollgrad as ug
        >>> history = {"theta": np.log([[0.1], [0.2]]), "sigma": np.ones((2, 1)),
        ...            "loss": np.zeros(2), "inner_steps": np.array([5, 5])}
        >>> found = ug.stn.schedule(history, {"decay": 0.0}, ug.constraints.positive)
        >>> print(found.values["decay"].round(2), f"{found.at(7)['decay']:.2f}")
        [0.1 0.2] 0.20
    """
    missing = [name for name in ("theta", "sigma", "loss", "inner_steps") if name not in history]
    if missing:
        raise ValueError(
            f"`history` has no {', '.join(missing)}. Pass the history of a run of stn.delta_stn or "
            "stn.stn alone: `average` does not keep every replica's hyperparameters."
        )
    leaves, structure = jax.tree.flatten(arguments.floating_theta(theta))
    sizes = [x.size for x in leaves]
    rows = {name: np.asarray(history[name]) for name in ("theta", "sigma")}
    if rows["theta"].shape[1:] != (sum(sizes),):
        raise ValueError(
            f"`theta` has {sum(sizes)} numbers, but the history's have shape "
            f"{rows['theta'].shape[1:]}. Pass the theta of this run."
        )

    def tree(name):
        parts = np.split(rows[name], np.cumsum(sizes)[:-1], axis=1)
        shaped = (p.reshape(-1, *x.shape) for p, x in zip(parts, leaves, strict=True))
        return structure.unflatten(shaped)

    unconstrained = tree("theta")
    values = jax.tree.map(np.asarray, ug_constraints.constrain(constraints, unconstrained))
    taken = np.asarray(history["inner_steps"], np.int64)
    steps = np.cumsum(taken) - taken
    return Schedule(values, unconstrained, tree("sigma"), np.asarray(history["loss"]), steps)


def _lines(found: Schedule) -> list[tuple[str, np.ndarray]]:
    """The name and the values of each number that is drawn."""
    lines = []
    for path, x in jax.tree_util.tree_leaves_with_path(found.values):
        name = "".join(
            str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) + " " for k in path
        ).strip()
        flat = np.asarray(x).reshape(len(x), -1)
        several = flat.shape[1] > 1
        lines += [
            (f"{name} {i}".strip() if several else name or "theta", flat[:, i])
            for i in range(flat.shape[1])
        ]
    return lines[:_MOST_LINES]

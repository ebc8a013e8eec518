"""What ``fit`` returns."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import html
from unrollgrad._fit import files, picture
from unrollgrad.types import MadeBy, WorkerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LEAVES = 12  # of theta, in a notebook


class FitResult(NamedTuple):
    """The result of ``fit``.

    Attributes:
        theta: Outer parameters after the last step.
        opt_state: The state of the outer optimizer.
        worker_state: The state of the estimator.
        history: Arrays by name. With one number per outer step: ``loss`` (the estimate before the
            update, of the windows that this step ran), ``grad_norm`` and the fields of the
            estimator's ``info``. With one per evaluation: ``evaluated_at``, the number of steps
            done, and the values of ``evaluate``.

    Workers in lockstep are all at the same window, and late windows of an episode often have lower
    losses than early ones: ``history["loss"]`` then looks like a saw. ``curve()`` is its mean over
    whole episodes, which estimates J.
    """

    theta: Any
    opt_state: optax.OptState
    worker_state: WorkerState
    history: dict[str, np.ndarray]

    def __repr__(self):
        losses = self.history.get("loss", np.zeros(0))
        told = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if len(losses) else ""
        shapes = jax.tree.map(arguments.describe, self.theta)
        return f"FitResult({len(losses)} steps{told}, theta={shapes})"

    def _repr_html_(self):
        losses = self.history.get("loss", np.zeros(0))
        rows: list[tuple[object, object]] = [("outer steps", len(losses))]
        if len(losses):
            rows.append(("loss of a step", f"{losses[0]:.4g} to {losses[-1]:.4g}"))
        windows = _windows_per_episode(self.worker_state)
        if windows and windows > 1 and len(losses) >= windows:
            first, *_, last = np.repeat(self.curve()[1], 2)
            rows.append((f"loss, mean over {windows} windows", f"{first:.4g} to {last:.4g}"))
        rows += [(name, f"{x[-1]:.4g}") for name, (_, x) in self._evaluations().items()]
        leaves = jax.tree_util.tree_leaves_with_path(self.theta)
        for path, x in leaves[:_MOST_LEAVES]:
            rows.append((f"theta{jax.tree_util.keystr(path)}", _shown(x)))
        if len(leaves) > _MOST_LEAVES:
            rows.append(("theta", f"and {len(leaves) - _MOST_LEAVES} leaves more"))
        return html.table(rows, caption="FitResult")

    def curve(
        self, name: str = "loss", num_windows: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Averages a record over whole episodes; ``plt.plot(*result.curve())`` draws it.

        Args:
            name: A name of ``history`` with one number per outer step.
            num_windows: The windows of an episode, n = T/K, over which a running mean is taken. By
                default it is that of the estimator that made ``worker_state``.

        Returns:
            The numbers of steps done, n, n + 1, ..., and the mean of the n values up to each. With
            fewer than n steps both are empty.

        Raises:
            ValueError: If the record does not exist or is an evaluation's, or ``worker_state`` does
                not tell n (the horizon is sampled, or the estimator is a curriculum, an algorithm
                without episodes or your own).
        """
        steps = len(self.history.get("loss", ()))
        after = list(self._evaluations(every=True))
        names = [key for key in self.history if key not in ("evaluated_at", *after)]
        if name not in names:
            raise ValueError(
                f"`name` must be a record with one number per outer step, one of {names}; got "
                f"{name!r}."
            )
        if num_windows is None:
            num_windows = _windows_per_episode(self.worker_state)
        if num_windows is None:
            raise ValueError(
                "`worker_state` does not tell how many windows an episode has (a sampled horizon, "
                "a curriculum, or an estimator without episodes). Pass num_windows, for example "
                "the mean horizon over the truncation; 1 averages nothing."
            )
        size = arguments.positive_int("num_windows", num_windows)
        values = self.history[name]
        if steps < size:
            return np.arange(0), values[:0]
        windows = np.lib.stride_tricks.sliding_window_view(values, size, axis=0)
        return np.arange(size, steps + 1), windows.mean(axis=-1)

    def plot(self) -> "Figure":
        """Draws the loss of every step, its ``curve`` and, beside them, scalar evaluations.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        losses = self.history.get("loss", np.zeros(0))
        windows = _windows_per_episode(self.worker_state)
        mean = self.curve() if windows and windows > 1 else None
        return picture.draw(losses, mean, self._evaluations())

    def _evaluations(self, every: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The evaluations by name, with their steps; those of more than a number if ``every``."""
        names = list(self.history)
        if "evaluated_at" not in names:
            return {}
        names = names[names.index("evaluated_at") + 1 :]
        at, found = self.history["evaluated_at"], {k: self.history[k] for k in names}
        return {k: (at, x) for k, x in found.items() if every or x.ndim == 1}

    def save(self, path: str | Path) -> Path:
        """Writes everything to one file, such as ``run.npz``; an existing file is replaced."""
        return files.save(path, self._asdict())

    @classmethod
    def load(cls, path: str | Path, like: Any) -> "FitResult":
        """Reads a file that ``save`` wrote.

        Args:
            path: Path of the file.
            like: A FitResult with the same structures, or theta alone, of which only the
                structure, shapes and dtypes matter: then the states are None.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If ``save`` did not write it, or it holds another result than ``like``.
        """
        wanted: dict[str, Any] = {"theta": like, "opt_state": None, "worker_state": None}
        if isinstance(like, cls):
            wanted = {name: getattr(like, name) for name in wanted}
        leaves = files.load(path)
        states = {name: files.like(x, leaves, f"['{name}']") for name, x in wanted.items()}
        begins = "['history']['"
        history = {k[len(begins) : -2]: x for k, x in leaves.items() if k.startswith(begins)}
        return cls(**states, history=history)


def _windows_per_episode(worker_state: WorkerState) -> int | None:
    """T/K, as the maker of the state says; None if it does not."""
    made_by = getattr(worker_state, "made_by", None)
    settings = dict(made_by.settings) if isinstance(made_by, MadeBy) else {}
    horizon = settings.get("horizon")
    if not isinstance(horizon, int):
        return None
    truncation = settings.get("truncation", horizon)
    return horizon // truncation if isinstance(truncation, int) else None


def _shown(x: Any) -> str:
    """A leaf of theta: its value if it is one number, its type and shape if it is more."""
    if np.size(x) == 1 and getattr(x, "is_fully_addressable", True):
        return f"{float(np.ravel(x)[0]):.4g}"
    return arguments.describe(x)

"""``implicit_bias``: cold and warm starts in the plane, in closed form (Vicol et al. 2022).

One learned datum and two weights. The inner loss is f(theta, w) = (x(theta).w - r)^2 / 2 with the
datum's direction x = (cos theta, sin theta); its minima are the line that touches the circle of
radius r at r x(theta). The outer loss F is half the mean squared error on three real points, which
w* = (R, 0), R > r, fits exactly; their directions are 120 degrees apart, so that
F(w) = |w - w*|^2 / 4. Solving the inner problem from w means: going to the nearest point of the
line.

Cold start, from zero. The solution is r x(theta), on the circle for every theta. So F is at least
(R - r)^2 / 4, at theta = 0.

Warm start, from the last solution. In the limit of small outer steps the solution moves at right
angles to its line, the line rolls on the circle, and w = r x(theta) - r (theta - theta0) x'(theta):
the circle's involute, the end of a thread that is unwound. dF/dtheta = r (theta - theta0)
(r - R cos theta) / 2, so that theta goes on until the line meets w*, at +-alpha, cos alpha = r / R;
for -alpha < theta0 < alpha it goes away from theta0 across zero. There F = (r (alpha + |theta0|) -
r tan alpha)^2 / 4: it depends on where theta began, and it is zero for theta0 = alpha - tan alpha.

Trained again from zero with the warm start's theta, w is r x(alpha), and F = (R^2 - r^2) / 4: what
the warm start knows is in w, and theta does not say it.

On the circle the implicit derivative (pseudo-inverse) is zero: the solution of a cold start moves
along the Hessian's null space, which that derivative leaves out. So theta stays. Few inner steps of
gradient descent from zero end on a smaller circle. With a penalty lambda |w|^2 / 2 the minimum is
unique, r x / (1 + lambda), and both starts end there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.bilevel.implicit_bias_figure import draw

RADIUS, DISTANCE = 1.0, 2.0
"""r, the inner target, and R, the distance from zero of the weights that fit the real points."""

ALPHA = math.acos(RADIUS / DISTANCE)
"""The angle at which the datum's line meets w*."""

PERFECT = ALPHA - math.tan(ALPHA)
"""The first angle from which a warm start ends at w*."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """A datum's angle is learned; the inner problem fits two weights to it, from cold or warm.

    The inner problem's minima are a line, and training goes to the nearest of them. Everything is
    known in closed form and nothing is drawn, so that one seed says it all. In float64.
    """

    starts: tuple[float, ...] = (PERFECT, -0.8, -0.4, -0.2, 0.3)
    """The first angles theta0, in radians, between -alpha and alpha = 1.047. The first one is drawn
    along its whole path; by default it is the one from which the warm start reaches w*."""
    num_steps: int = 60_000
    """Outer steps."""
    learning_rate: float = 1e-3
    """Rate of the outer gradient descent. The closed forms of the warm start are its limit at 0."""
    damping: float = 1e-6
    """The inner problem also has the term damping / 2 |w - start|^2; the hypergradient is exact for
    this damped problem, from either start."""
    penalty: float = 1.0
    """The weight of |w|^2 / 2 in the control, whose inner minimum is unique."""
    inner_steps: int = 5
    """Inner steps of the cold start that does not reach the line."""
    inner_learning_rate: float = 0.2
    """Their rate."""
    points: int = 150
    """Number of points of each path; it divides ``num_steps``."""
    seeds: tuple[int, ...] = (0,)
    """Nothing is drawn: all seeds give the same numbers."""


SCALES = {
    "smoke": Settings(
        scale="smoke", starts=(PERFECT, 0.3), num_steps=4000, learning_rate=0.02, points=8
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=300_000, learning_rate=2e-4),
}

RANK = 1e-10
"""Singular values below this fraction of the largest count as zero."""

FITS = 1e-6
"""An outer loss below which w fits the three real points."""

CLOSE = 2e-3
"""How far numbers may be from the closed forms, which are limits for small outer steps."""


def fill(settings: Settings) -> Settings:
    """Checks the settings and returns them unchanged.

    Raises:
        ValueError: If the points do not divide the outer steps, or a start is not below alpha.
    """
    if settings.num_steps % settings.points:
        raise ValueError(f"`points`={settings.points} must divide num_steps={settings.num_steps}.")
    if not all(0 < abs(start) < ALPHA for start in settings.starts):
        raise ValueError(f"`starts` must be in (-1.047, 1.047) and not 0; got {settings.starts}.")
    return settings


class Paths(NamedTuple):
    """Where theta and w are along a run, and the outer loss; leading axes (starts, points)."""

    theta: Any
    w: Any
    loss: Any


def direction(theta: Any) -> jax.Array:
    """The datum's direction x(theta)."""
    return jnp.stack([jnp.cos(theta), jnp.sin(theta)])


def outer(w: jax.Array, theta: Any) -> jax.Array:
    """Half the mean squared error on the three real points; it is |w - w*|^2 / 4."""
    real = jax.vmap(direction)(jnp.pi * jnp.array([1 / 2, 7 / 6, 11 / 6]))
    return jnp.mean((real @ w - real @ jnp.array([DISTANCE, 0.0])) ** 2) / 2


def inner_loss(penalty: float) -> Callable[[Any, Any], jax.Array]:
    """The loss on the learned datum, with a penalty."""

    def inner(w, theta):
        fit = (direction(theta) @ w - RADIUS) ** 2 / 2
        return fit + penalty / 2 * jnp.sum(w**2)

    return inner


def newton(penalty: float, damping: float) -> Callable[[Any], optax.GradientTransformation]:
    """One step from w reaches the minimum of inner + damping / 2 |. - w|^2."""

    def optimizer(theta):
        x = direction(theta)
        hessian = jnp.outer(x, x) + (penalty + damping) * jnp.eye(2)
        return optax.stateless(lambda grad, w: -jnp.linalg.solve(hessian, jnp.asarray(grad)))

    return optimizer


def methods(settings: Settings) -> dict[str, dict[str, Any]]:
    """The arguments of ``ug.bilevel.solve`` in which the methods differ, by method."""

    def exact(start, penalty=0.0, implicit=False):
        inner, damping = inner_loss(penalty), settings.damping
        f = ug.implicit.hypergradient(
            outer, inner, solver=ug.implicit.dense(RANK), damping=0.0 if implicit else damping
        )
        optimizer = newton(penalty, damping)
        arguments = {"inner_optimizer": optimizer, "inner_steps": 1, "start": start}
        return {"inner": inner, "hypergradient": f, **arguments}

    sgd, inner = optax.sgd(settings.inner_learning_rate), inner_loss(0.0)
    few = ug.bilevel.unrolled(outer, inner, optimizer=sgd, num_steps=settings.inner_steps)
    return {
        "cold": exact("cold"),
        "warm": exact("warm"),
        "cold, implicit": exact("cold", implicit=True),
        "cold, few steps": {
            "inner": inner,
            "hypergradient": few,
            "inner_optimizer": sgd,
            "inner_steps": 0,
            "start": "cold",
        },
        "cold, penalty": exact("cold", settings.penalty),
        "warm, penalty": exact("warm", settings.penalty),
    }


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the paths of the cold and the warm start, and the ends of all methods."""
    with jax.enable_x64(True):
        names = list(methods(settings))
        for i, method in enumerate(names):
            progress(method, i / len(names))
            found = jax.tree.map(np.asarray, descents(settings.without_run(), method))
            for j, start in enumerate(settings.starts):
                for row in _rows(settings, method, start, jax.tree.map(lambda x, j=j: x[j], found)):
                    write({"method": method, "start": f"{start:.3f}", **row})


def _rows(settings: Settings, method: str, start: float, path: Paths) -> list[dict[str, Any]]:
    """The lines of a method's run from one angle: a path, or its end alone."""
    end = jax.tree.map(lambda x: x[-1], path)
    if method == "cold, few steps":  # its path has the weights before the steps
        return [{"theta": end.theta, "loss": end.loss}]
    if method not in ("cold", "warm"):
        return [_numbers(end)]
    every = settings.num_steps // settings.points
    points = [jax.tree.map(lambda x, k=k: x[k], path) for k in range(settings.points)]
    out: list[dict[str, Any]] = [{"step": 0, **_numbers(_trained(settings, start))}]
    out += [{"step": (k + 1) * every, **_numbers(point)} for k, point in enumerate(points)]
    if method == "warm":
        out.append({"method": "re-trained", **_numbers(_trained(settings, end.theta))})
    return out


def _numbers(at: Paths) -> dict[str, float]:
    return {"theta": at.theta, "w1": at.w[0], "w2": at.w[1], "loss": at.loss}


@functools.lru_cache(maxsize=16)
def descents(settings: Settings, method: str) -> Paths:
    """The paths of a method from all first angles, in one program."""
    every = settings.num_steps // settings.points

    def descend(theta):
        found = ug.bilevel.solve(
            params=jnp.zeros(2),
            theta=theta,
            outer_optimizer=optax.sgd(settings.learning_rate),
            num_steps=settings.num_steps,
            every=every,
            **methods(settings)[method],
        )
        return Paths(found.thetas, found.paths, found.outer_losses[every - 1 :: every])

    return jax.jit(jax.vmap(descend))(jnp.array(settings.starts))


def _trained(settings: Settings, theta: float) -> Paths:
    """The weights that are trained from zero with a theta: the first ones of every path."""
    zero = jnp.zeros(2)
    grad = jax.grad(inner_loss(0.0))(zero, theta)
    step, _ = newton(0.0, settings.damping)(theta).update(grad, optax.EmptyState(), zero)
    w = zero + jnp.asarray(step)
    return Paths(theta, np.asarray(w), np.asarray(outer(w, theta)))


def show(records: list[Record]) -> None:
    """Prints where every method ends."""
    last: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        last.setdefault((r.labels["method"], r.labels["start"]), {})[r.metric] = r.value
    for (method, start), at in last.items():
        w = f", w = ({at['w1']:.4f}, {at['w2']:7.4f})" if "w1" in at else ""
        loss = f"outer loss {at['loss']:.3g}"
        print(f"{method:>16} from theta = {start:>6}: {loss}, theta {at['theta']:7.4f}{w}")


def claims(summary: Summary) -> list[Claim]:
    """The ends are those of the closed forms; where the inner minimum is unique, they are one."""
    config = summary.about["config"]
    starts = {f"{start:.3f}": start for start in config["starts"]}
    first, paper = next(iter(starts)), "Vicol et al. 2022"
    losses = {
        method: {start: _end(summary, "loss", method, start) for start in starts}
        for method in ("cold", "warm", "re-trained", "cold, implicit", "cold, few steps")
    }
    out = []
    if f"{PERFECT:.3f}" == first:
        least = losses["warm"][first]
        says = f"warm, from theta = {first}: w ends where it fits the three real points"
        ours = f"outer loss {evidence.shown(least, '.2g')}; distance from cold's end "
        ours += evidence.shown(_apart(summary, first), ".4f")
        out.append(Claim(says, paper, ours, evidence.told(least < FITS, least)))
    shrunk = RADIUS * (1 - (1 - config["inner_learning_rate"]) ** config["inner_steps"])
    closed = {
        "cold": lambda start: (DISTANCE - RADIUS) ** 2 / 4,
        "warm": lambda start: (RADIUS * (ALPHA + abs(start)) - RADIUS * math.tan(ALPHA)) ** 2 / 4,
        "re-trained": lambda start: (DISTANCE**2 - RADIUS**2) / 4,
        "cold, few steps": lambda start: (DISTANCE - shrunk) ** 2 / 4,
    }
    says_of = {
        "cold": "cold: the outer loss ends at (R - r)^2 / 4, wherever theta began",
        "warm": "warm: the outer loss ends at (r alpha + r |theta0| - r tan alpha)^2 / 4",
        "re-trained": "trained again with warm's theta: (R^2 - r^2) / 4, more than cold's",
        "cold, few steps": "few inner steps from zero: a smaller circle, a larger loss",
    }
    for method, formula in closed.items():
        ends = losses[method]
        gap = float(np.max([abs(ends[s] - formula(x)) for s, x in starts.items()]))
        ours = ", ".join(evidence.shown(end, ".4f") for end in ends.values())
        ours += f"; at most {evidence.shown(gap, '.1e')} from the closed form"
        source = paper if method == "re-trained" else "our closed form"
        out.append(Claim(says_of[method], source, ours, evidence.told(gap < CLOSE, gap)))
    angles = {start: _end(summary, "theta", "cold, implicit", start) for start in starts}
    moved = float(np.max([abs(angles[s] - x) for s, x in starts.items()]))
    says = "cold, with the implicit derivative by the pseudo-inverse: theta stays where it began"
    ours = f"it moved by at most {evidence.shown(moved, '.1e')}"
    out.append(Claim(says, "our closed form", ours, evidence.told(moved < 1e-6, moved)))
    return [*out, _control(summary, list(starts), config["penalty"])]


def _control(summary: Summary, starts: list[str], penalty: float) -> Claim:
    """The claim that a unique inner minimum leaves no room for the start."""
    unique = (DISTANCE - RADIUS / (1 + penalty)) ** 2 / 4
    pairs = [
        [_end(summary, "loss", f"{kind}, penalty", start) for kind in ("cold", "warm")]
        for start in starts
    ]
    gap = float(np.max(np.abs(np.array(pairs) - unique)))
    says = f"control, penalty {penalty:g}: warm and cold end at (R - r / (1 + lambda))^2 / 4"
    ours = f"at most {evidence.shown(gap, '.1e')} from {evidence.shown(unique, '.4f')}"
    return Claim(says, "Vicol et al. 2022", ours, evidence.told(gap < 1e-6, gap))


def _end(summary: Summary, metric: str, method: str, start: str) -> float:
    found = summary.find(metric, method=method, start=start)
    return math.nan if found is None or found["mean"] is None else found["mean"]


def _apart(summary: Summary, start: str) -> float:
    """The distance between the ends of the warm and the cold start."""
    ends = [[_end(summary, w, m, start) for w in ("w1", "w2")] for m in ("warm", "cold")]
    return math.dist(*ends)


EXPERIMENT = Experiment(
    name="implicit_bias",
    about="Cold and warm starts in the plane: the circle and its involute, in closed form.",
    settings=Settings,
    scales=SCALES,
    labels=("method", "start"),
    fill=fill,
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "The paths of `ug.bilevel.solve` leave the closed forms as the outer rate goes to zero; or "
        "a network's training data, learned with warm starts, are as good for training from zero."
    ),
)

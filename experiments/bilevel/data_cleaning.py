"""``data_cleaning``: learns a weight per training image when half of the labels are wrong."""

import dataclasses
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
from unrollgrad.running import need


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Data hyper-cleaning: a linear classifier of digits is trained on partly wrong labels.

    The inner loss is sum_i sigmoid(theta_i) CE_i + num_train decay |w|^2, where CE_i is the
    cross-entropy of training image i. The outer loss is the cross-entropy on clean validation
    images. theta starts at 0, where all weights are equal. The papers use MNIST with 20,000
    training and 5,000 validation images; all scales here use scikit-learn's digits.
    """

    corruption: float = 0.5
    """Fraction of the training images whose label is replaced by a wrong one."""
    num_train: int = 1000
    """Number of training images; each has one outer parameter."""
    num_validation: int = 300
    """Number of clean images in the outer loss; the rest of the 1797 images are the test set."""
    decay: float = 1e-4
    """Coefficient of the classifier's squared norm |w|^2, relative to the mean cross-entropy."""
    inner_steps: int = 20
    """Inner steps per outer step; they start from the previous inner parameters."""
    inner_learning_rate: float = 0.3
    """Learning rate of the inner SGD with momentum 0.9, on the mean cross-entropy."""
    cg_steps: int = 20
    """Maximum number of conjugate-gradient steps in each hypergradient."""
    num_steps: int = 200
    """Number of outer steps."""
    learning_rate: float = 0.1
    """Learning rate of the outer Adam."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the three data sets and the wrong labels."""


SCALES = {
    "smoke": Settings(scale="smoke", num_train=400, num_validation=200, num_steps=100, seeds=(0,)),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=1000, seeds=tuple(range(10))),
}

POINTS = 20
"""Approximate number of points on the curve."""

BINS = 10
"""Bins of the weights' histogram in the picture."""

DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Candidates for the baseline with a tuned decay; validation accuracy chooses among them."""

METRICS = "test_accuracy", "gain", "gain_over_tuned", "gain_over_validation", "auc", "mean_weight"
"""Metrics that ``show`` prints."""

REFERENCES = {
    "no cleaning": "C1",
    "no cleaning, tuned decay": "C4",
    "clean labels only": "C2",
    "validation set only": "C3",
}
"""Baselines of the curve, with their colours."""

Classifier = dict[str, jax.Array]
"""Parameters of a linear classifier, "w" and "b"."""


class Data(NamedTuple):
    """Images and labels."""

    images: jax.Array
    labels: jax.Array


class Task(NamedTuple):
    """The data of a seed.

    Attributes:
        train: Training set; some of its labels are wrong.
        validation: Validation set with clean labels.
        test: Test set with clean labels.
        wrong: For each training label, whether it is wrong.
    """

    train: Data
    validation: Data
    test: Data
    wrong: jax.Array


def digits(key: jax.Array, *sizes: int) -> list[Data]:
    """Splits scikit-learn's digits, pixels in [0, 1], into sets of these sizes and the rest."""
    images, labels = need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    order = np.asarray(jax.random.permutation(key, len(images)))
    parts = np.split(order, np.cumsum(sizes))
    return [
        Data(jnp.asarray(images[rows] / 16, jnp.float32), jnp.asarray(labels[rows], jnp.int32))
        for rows in parts
    ]


def task(settings: Settings, seed: int) -> Task:
    """Draws the data of a seed."""
    split, which, other = jax.random.split(jax.random.key(seed), 3)
    train, validation, test = digits(split, settings.num_train, settings.num_validation)
    size = settings.num_train
    wrong = jax.random.permutation(which, size) < round(settings.corruption * size)
    shifted = (train.labels + jax.random.randint(other, (size,), 1, 10)) % 10
    labels = jnp.where(wrong, shifted, train.labels)
    return Task(Data(train.images, labels), validation, test, wrong)


def zeros() -> Classifier:
    """The linear classifier before training: all parameters are zero."""
    return {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}


def cross_entropies(params: Classifier, data: Data) -> jax.Array:
    """The cross-entropy of each image."""
    logits = data.images @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)


def accuracy(params: Classifier, data: Data) -> jax.Array:
    """The fraction of images that are classified correctly."""
    logits = data.images @ params["w"] + params["b"]
    return jnp.mean(jnp.argmax(logits, -1) == data.labels)


def minimise(loss: Callable[[Classifier], jax.Array], num_steps: int = 400) -> Classifier:
    """Minimises a strongly convex loss of a linear classifier by L-BFGS, starting from zero."""
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (zeros(), optimizer.init(zeros())), length=num_steps)
    return params


def losses(task: Task, decay: float) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The outer loss, a mean over validation images, and the inner loss, a sum over training."""

    def inner(params, theta):
        weighted = jnp.sum(jax.nn.sigmoid(theta) * cross_entropies(params, task.train))
        return weighted + len(theta) * decay * optax.tree.norm(params, squared=True)

    def outer(params, theta):
        return jnp.mean(cross_entropies(params, task.validation))

    return outer, inner


def clean(settings: Settings, task: Task, params: Classifier) -> "ug.bilevel.BilevelResult":
    """Learns theta, starting from 0; the inner parameters start at ``params``."""
    size = settings.num_train
    outer, inner = losses(task, settings.decay)
    solver = need("lineax", "lineax").CG(rtol=1e-3, atol=1e-3, max_steps=settings.cg_steps)
    return ug.bilevel.solve(
        inner,
        ug.implicit.hypergradient(outer, inner, solver=solver),
        params,
        jnp.zeros(size),
        inner_optimizer=optax.sgd(settings.inner_learning_rate / size, momentum=0.9),
        inner_steps=settings.inner_steps,
        outer_optimizer=optax.adam(settings.learning_rate),
        num_steps=settings.num_steps,
        every=_every(settings.num_steps),
    )


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the test accuracies of the baselines and during cleaning, and the final weights."""
    here = task(settings, seed)
    progress("references", 0.0)

    @jax.jit
    def trained(theta, decay):
        _, inner = losses(here, decay)
        return minimise(lambda params: inner(params, theta) / settings.num_train)

    @jax.jit
    def trained_on_validation():
        outer, _ = losses(here, settings.decay)
        return minimise(
            lambda p: outer(p, None) + settings.decay * optax.tree.norm(p, squared=True)
        )

    start = jnp.zeros(settings.num_train)
    uncleaned = trained(start, settings.decay)
    others = [trained(start, decay) for decay in DECAYS]
    references = {
        "no cleaning": uncleaned,
        "no cleaning, tuned decay": max(others, key=lambda p: float(accuracy(p, here.validation))),
        "clean labels only": trained(jnp.where(here.wrong, -jnp.inf, 0.0), settings.decay),
        "validation set only": trained_on_validation(),
    }
    found = {name: float(accuracy(params, here.test)) for name, params in references.items()}
    for name, value in found.items():
        write({"series": name, "test_accuracy": value})
    progress("cleaning", 0.3)
    result = clean(settings, here, uncleaned)
    thetas, every = [start, *result.thetas], _every(settings.num_steps)
    accuracies = jax.vmap(lambda params: accuracy(params, here.test))(result.paths)
    for i, (theta, value) in enumerate(
        zip(thetas, [found["no cleaning"], *accuracies], strict=True)
    ):
        numbers = {"test_accuracy": float(value), "auc": auc(theta, here.wrong)}
        write({"series": "cleaning", "step": i * every, **numbers})
    again = float(accuracy(trained(result.theta, settings.decay), here.test))
    gains = {
        "gain": again - found["no cleaning"],
        "gain_over_tuned": again - found["no cleaning, tuned decay"],
        "gain_over_validation": again - found["validation set only"],
    }
    write({"series": "cleaning, trained anew", "test_accuracy": again, **gains})
    _write_weights(np.asarray(jax.nn.sigmoid(result.theta)), np.asarray(here.wrong), write)


def _write_weights(weights: np.ndarray, wrong: np.ndarray, write: Write) -> None:
    """Writes the mean and the histogram of the weights, for clean and for corrupted images."""
    for name, group in {"clean": weights[~wrong], "corrupted": weights[wrong]}.items():
        shares = np.histogram(group, BINS, (0.0, 1.0))[0] / len(group)
        bins = {f"{(i + 0.5) / BINS:.2f}": float(share) for i, share in enumerate(shares)}
        write({"series": name, "mean_weight": float(group.mean()), "share": bins})


def auc(theta: jax.Array, wrong: jax.Array) -> float:
    """The fraction of (clean, corrupted) pairs whose clean image weighs more; a tie counts 1/2."""
    more = theta[~wrong][:, None] - theta[wrong]
    return float(jnp.mean((jnp.sign(more) + 1) / 2))


def _every(num_steps: int) -> int:
    """The outer steps between points of the curve; it divides ``num_steps``."""
    return next(n for n in range(max(num_steps // POINTS, 1), num_steps + 1) if num_steps % n == 0)


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the test accuracy against outer steps, and the histogram of the weights."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    accuracies = [r for r in records if r.metric == "test_accuracy"]
    for i, seed in enumerate(dict.fromkeys(r.seed for r in accuracies)):
        line = [r for r in accuracies if r.seed == seed and r.labels["series"] == "cleaning"]
        places, values = [r.step for r in line], [100 * r.value for r in line]
        left.plot(places, values, color="C0", label=None if i else "cleaning")
    for name, color in REFERENCES.items():
        values = _values(accuracies, name, "test_accuracy")
        if values:
            left.axhline(
                100 * float(np.mean(values)), color=color, linestyle="--", label=f"{name} (mean)"
            )
    left.set(xlabel="outer steps", ylabel="test accuracy, %")
    left.grid(alpha=0.3)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.24), ncols=2, fontsize="small")
    for i, name in enumerate(("clean", "corrupted")):
        bins = list(dict.fromkeys(r.metric for r in records if r.metric.startswith("share[")))
        shares = [100 * float(np.mean(_values(records, name, metric) or [0])) for metric in bins]
        places = [float(metric[6:-1]) + (i - 0.5) * 0.4 / BINS for metric in bins]
        right.bar(places, shares, 0.4 / BINS, color=("C2", "C3")[i], label=f"{name} labels")
    right.set(xlabel="weight at the end", ylabel="share of the images, %")
    right.legend(loc="upper center")
    share = f"{100 * config['corruption']:g} %"
    figure.suptitle(f"digits, {share} of the training labels wrong")
    return figure


def _values(records: list[Record], series: str, metric: str) -> list[float]:
    """Values at the last step, one per seed."""
    found = [r for r in records if r.labels["series"] == series and r.metric == metric]
    return list({r.seed: r.value for r in found}.values())


def show(records: list[Record]) -> None:
    """Prints the final accuracies and the mean weights."""
    for name in dict.fromkeys(r.labels["series"] for r in records):
        for metric in METRICS:
            values = _values(records, name, metric)
            if values:
                print(f"{name:>25} {metric:>20}: {_mean(values)}")


def _mean(values: list[float]) -> str:
    se = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{se}"


def claims(summary: Summary) -> list[Claim]:
    """Cleaning gains 5 points of accuracy, and the weights identify the wrong labels."""
    out = []
    share = f"{100 * summary.about['config']['corruption']:g} %"
    source = "aim of this experiment; the task is of Franceschi et al. 2017"
    gain = summary.find("gain", series="cleaning, trained anew")
    if gain:
        learned = evidence.above(evidence.times(gain, 100), 5.0)
        out.append(
            Claim(
                f"with {share} wrong labels, learned weights give at least 5 points of test "
                "accuracy over equal ones, both trained to convergence",
                source,
                f"{learned.text} points: " + _compared(summary),
                learned.holds,
            )
        )
    separation = summary.find("auc", series="cleaning")
    weights = {name: summary.find("mean_weight", series=name) for name in ("clean", "corrupted")}
    if separation and all(weights.values()):
        told = evidence.above(separation, 0.9)
        means = ", ".join(f"{name} {evidence.number(w)}" for name, w in weights.items())
        ours = f"AUC {told.text}; mean weights: {means}"
        out.append(Claim("the weights tell wrong labels from clean ones", source, ours, told.holds))
    return [*out, *_claims_of_controls(summary)]


def _claims_of_controls(summary: Summary) -> list[Claim]:
    """Cleaning beats baselines without weights."""
    out = []
    controls = {
        "gain_over_tuned": "equal weights and a decay that is tuned on the validation images",
        "gain_over_validation": "training on the clean validation images alone",
    }
    for metric, says in controls.items():
        found = summary.find(metric, series="cleaning, trained anew")
        if found:
            better = evidence.above(evidence.times(found, 100), 0.0)
            out.append(
                Claim(
                    f"cleaning is better than {says}",
                    "a control of ours",
                    f"{better.text} points",
                    better.holds,
                )
            )
    return out


def _compared(summary: Summary) -> str:
    names = ("cleaning, trained anew", *REFERENCES)
    found = {name: summary.find("test_accuracy", series=name) for name in names}
    return ", ".join(f"{name} {points(result)} %" for name, result in found.items() if result)


def points(result: dict[str, Any]) -> str:
    """Formats a fraction in per cent, with its standard error."""
    return evidence.number(evidence.times(result, 100))


EXPERIMENT = Experiment(
    name="data_cleaning",
    about="A weight per training image, learned where half of the labels are wrong.",
    settings=Settings,
    scales=SCALES,
    labels=("series",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)

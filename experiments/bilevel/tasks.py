"""Bilevel tasks with linear classifiers and their exact outer losses; quadratics with a solution.

Three tasks are those of the field's benchmark (github.com/benchopt/benchmark_bilevel), on data that
is generated here or comes with scikit-learn. The twins have the shapes and the imbalance of the
data sets, not their content:

- ijcnn1 twin: 22 features x = C u with u standard normal and C = I + 0.3 G / sqrt(22), G standard
  normal; a binary label drawn with probability sigmoid(w x + c), w standard normal / 2, c chosen so
  that 9.7 % are positive.
- covtype twin: 10 standard normal features and two one-hot groups of 4 and 40, whose categories
  have probabilities proportional to 1 / rank; 7 classes drawn from softmax(W x + c), W standard
  normal, c the logarithms of (0.365, 0.488, 0.062, 0.005, 0.016, 0.030, 0.035).
- digits: scikit-learn's, standardised; labels of half of the training images are replaced by
  uniform ones.

With files of the originals in a folder (``ijcnn1``, ``ijcnn1.t``, ``covtype`` in LIBSVM's format,
or with ``.bz2``), these are read instead, and permuted; the inner loss of ijcnn1 has rows of the
first file, the outer loss rows of the second.
"""

import bz2
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from unrollgrad.running import need

Name = Literal["quadratics", "ijcnn1", "covtype", "cleaning"]

NEWTON_STEPS = 30
"""Most Newton steps from zero to the inner minimum."""

COVTYPE_CLASSES = (0.365, 0.488, 0.062, 0.005, 0.016, 0.030, 0.035)
"""Shares of the classes in covtype, rounded."""


class Rows(NamedTuple):
    """Features and labels; in the cleaning task also the row's number."""

    x: Any
    y: Any
    row: Any


class Task(NamedTuple):
    """A bilevel problem whose inner minimum can be computed.

    Attributes:
        outer: ``outer(params, theta, batch)``, a mean over the batch.
        inner: ``inner(params, theta, batch)``, a mean over the batch.
        params: The first params.
        theta: The first theta.
        outer_data: Rows of the outer loss.
        inner_data: Rows of the inner loss.
        batch_size: Rows per batch.
        measure: ``measure(theta)`` returns the numbers at the exact inner minimum: ``value`` (the
            outer loss h), ``grad`` (the hypergradient), ``residual`` (of the inner minimum), and
            ``error`` (the share of wrong predictions on a test set; NaN where there is none).
        least: The least h, or None if it is not known.
        touched: The entries of theta that a batch of the inner data touches, for SABA's memory.
    """

    outer: Callable[..., jax.Array]
    inner: Callable[..., jax.Array]
    params: Any
    theta: Any
    outer_data: Any
    inner_data: Any
    batch_size: int
    measure: Callable[[Any], dict[str, jax.Array]]
    least: float | None = None
    touched: Callable[[Any], Any] | None = None


class Sizes(NamedTuple):
    """Numbers of rows for the inner loss, the outer loss and the test error."""

    inner: int
    outer: int
    test: int = 0


def make(name: Name, seed: int, sizes: Sizes, folder: Path | None = None) -> Task:
    """Makes a task; ``measure`` is exact to rounding under ``jax.enable_x64``.

    Args:
        name: The task.
        seed: The seed of the data.
        sizes: Rows to use.
        folder: Where the original files are; None: generated data.

    Raises:
        ValueError: If a folder is given for a task without files, or a file has too few rows.
        FileNotFoundError: If a file is missing.
    """
    if folder and name not in ("ijcnn1", "covtype"):
        raise ValueError(f"`data` is for the tasks ijcnn1 and covtype; got {folder} for {name}.")
    if name == "quadratics":
        return _quadratics(seed, sizes)
    rng = np.random.default_rng(seed)
    x, y, num_classes = {"ijcnn1": _ijcnn1, "covtype": _covtype, "cleaning": _digits}[name](
        rng, sizes, folder
    )
    parts = np.split(np.arange(len(x)), np.cumsum(sizes))[:3]
    rows = [Rows(x[i], y[i], np.arange(len(i))) for i in parts]
    if name == "cleaning":
        wrong = rng.random(sizes.inner) < 0.5
        drawn = rng.integers(0, 10, sizes.inner)
        rows[0] = rows[0]._replace(y=np.where(wrong, drawn, rows[0].y))
        return _classifier(rows, num_classes, cleaning=True)
    return _classifier(rows, num_classes, cleaning=False)


def _ijcnn1(rng: np.random.Generator, sizes: Sizes, folder: Path | None) -> tuple[Any, Any, int]:
    if folder:
        files = {"ijcnn1": sizes.inner, "ijcnn1.t": sizes.outer}
        parts = [_libsvm(rng, folder / file, 22, num) for file, num in files.items()]
        x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
        return x, y > 0, 1
    num = sum(sizes)
    mixing = np.eye(22) + 0.3 * rng.standard_normal((22, 22)) / 22**0.5
    x = rng.standard_normal((num, 22)) @ mixing
    slope = x @ rng.standard_normal(22) / 2

    def too_many(shift):
        return np.mean(1 / (1 + np.exp(-slope - shift))) - 0.097

    shift = scipy.optimize.brentq(too_many, -30, 30)
    return x, rng.random(num) < 1 / (1 + np.exp(-slope - shift)), 1


def _covtype(rng: np.random.Generator, sizes: Sizes, folder: Path | None) -> tuple[Any, Any, int]:
    num = sum(sizes)
    if folder:
        x, y = _libsvm(rng, folder / "covtype", 54, num)
        return (x - x.mean(0)) / np.maximum(x.std(0), 1e-9), y.astype(int) - 1, 7
    parts = [rng.standard_normal((num, 10))]
    for size in (4, 40):
        shares = 1 / np.arange(1, size + 1)
        parts.append(np.eye(size)[rng.choice(size, num, p=shares / shares.sum())])
    x = np.concatenate(parts, 1)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    logits = x @ rng.standard_normal((54, 7)) / 2 + np.log(COVTYPE_CLASSES)
    return x, np.argmax(logits + rng.gumbel(size=logits.shape), 1), 7


def _digits(rng: np.random.Generator, sizes: Sizes, folder: Path | None) -> tuple[Any, Any, int]:
    x, y = need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    order = rng.permutation(len(x))[: sum(sizes)]
    x = x[order]
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-9), y[order], 10


def _libsvm(
    rng: np.random.Generator, path: Path, num_features: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows ``label index:value ...``, indices from 1, and returns some in a random order.

    Args:
        rng: Draws the order.
        path: The file, which may be compressed: then its name has ``.bz2`` behind it.
        num_features: The largest index.
        num_rows: The rows to return.

    Raises:
        FileNotFoundError: If neither form of the file exists.
        ValueError: If it has fewer rows, or an index beyond the last feature.
    """
    packed = path.with_name(f"{path.name}.bz2")
    if not path.is_file() and not packed.is_file():
        raise FileNotFoundError(f"{path.parent} has neither {path.name} nor {packed.name}.")
    content = path.read_text() if path.is_file() else bz2.decompress(packed.read_bytes()).decode()
    lines = [line.split() for line in content.splitlines() if line.strip()]
    if len(lines) < num_rows:
        raise ValueError(f"{path} has {len(lines)} rows; the task needs {num_rows} at this scale.")
    x = np.zeros((len(lines), num_features))
    for row, (_, *entries) in enumerate(lines):
        for entry in entries:
            index, value = entry.split(":")
            if not 1 <= int(index) <= num_features:
                raise ValueError(
                    f"{path}, row {row + 1}: the index {index} is not in 1..{num_features}."
                )
            x[row, int(index) - 1] = float(value)
    order = rng.permutation(len(x))[:num_rows]
    return x[order], np.array([float(line[0]) for line in lines])[order]


def _losses_of(params: jax.Array, rows: Rows) -> jax.Array:
    """The loss of each row: logistic for one column of params, else the cross-entropy."""
    logits = rows.x @ params
    if params.shape[1] == 1:
        return optax.sigmoid_binary_cross_entropy(logits[:, 0], rows.y)
    labels = jax.nn.one_hot(rows.y, params.shape[1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, labels)


def _classifier(rows: list[Rows], num_classes: int, cleaning: bool) -> Task:
    """A linear classifier whose inner loss is regularised, or has a weight per row.

    The regulariser of ijcnn1 has one exp(theta) per feature, that of covtype one per class, with a
    factor 1/2; the cleaning task weighs row i by sigmoid(theta_i) and adds 0.2 |params|^2.
    """
    train, validation, test = rows
    num_features = train.x.shape[1]
    params = np.zeros((num_features, num_classes))
    count = len(train.x) if cleaning else num_features if num_classes == 1 else num_classes
    theta = np.full(count, 0.0 if num_classes == 1 else -2.0)

    def decays(theta):
        if cleaning:
            return jnp.full(params.shape, 0.4, params.dtype)
        along = jnp.exp(theta)[:, None] if num_classes == 1 else jnp.exp(theta)[None]
        return jnp.broadcast_to(along, params.shape)

    def weights(theta, batch):
        return jax.nn.sigmoid(theta[batch.row]) if cleaning else jnp.ones(len(batch.row))

    def inner(params, theta, batch):
        penalty = jnp.sum(decays(theta) * params**2) / 2
        return jnp.mean(weights(theta, batch) * _losses_of(params, batch)) + penalty

    def outer(params, theta, batch):
        return jnp.mean(_losses_of(params, batch))

    measure = _measure(inner, outer, (jnp.asarray(params), train, validation, test))
    touched = (lambda batch: batch.row) if cleaning else None
    return Task(outer, inner, params, theta, validation, train, 64, measure, None, touched)


def _measure(
    inner: Callable[..., jax.Array],
    outer: Callable[..., jax.Array],
    data: tuple[Any, Rows, Rows, Rows],
) -> Callable[[Any], dict[str, jax.Array]]:
    """The exact numbers by Newton's method from zero, whose steps are conjugate gradients."""
    zero, train, validation, test = data

    @jax.jit
    def measure(theta):
        def slope(params):
            return jax.grad(inner)(params, theta, train)

        def solved(params, right, tol):
            _, product = jax.linearize(slope, params)
            return jax.scipy.sparse.linalg.cg(product, right, tol=tol, maxiter=500)[0]

        def going(carry):
            params, i = carry
            return (i < NEWTON_STEPS) & (jnp.max(jnp.abs(slope(params))) > 1e-12)

        def newton(carry):
            params, i = carry
            return params - solved(params, slope(params), 1e-4), i + 1

        params, _ = jax.lax.while_loop(going, newton, (zero, 0))
        q = solved(params, jax.grad(outer)(params, theta, validation), 1e-12)

        def along(theta):
            return jnp.vdot(jax.grad(inner)(params, theta, train), q)

        error = jnp.nan
        if len(test.x):
            error = jnp.mean(jnp.argmax(test.x @ params, 1) != test.y)
        return {
            "value": outer(params, theta, validation),
            "grad": -jax.grad(along)(theta),
            "residual": jnp.max(jnp.abs(slope(params))),
            "error": error,
        }

    return measure


def _quadratics(seed: int, sizes: Sizes) -> Task:
    """Finite sums of quadratics of 10 + 5 variables, whose samples differ in all their terms.

    inner = z' H_i z / 2 + z' B_i x - z' h_i, outer = |z - a_j|^2 / 2 + 0.05 |x - b_j|^2; the mean
    Hessian has eigenvalues from 0.3 to 1.
    """
    rng, d, p = np.random.default_rng(seed), 10, 5
    basis, _ = np.linalg.qr(rng.standard_normal((d, d)))
    middle = basis @ np.diag(np.geomspace(0.3, 1, d)) @ basis.T
    factors = rng.standard_normal((sizes.inner, d)) * 0.2
    spread = factors[:, :, None] * factors[:, None]
    hessians = middle + spread - spread.mean(0)
    mixed = 0.3 * rng.standard_normal((d, p)) / d**0.5
    mixed = mixed + 0.1 * rng.standard_normal((sizes.inner, d, p)) / d**0.5
    slopes = rng.standard_normal(d) + rng.standard_normal((sizes.inner, d))
    targets = rng.standard_normal(d) + rng.standard_normal((sizes.outer, d))
    centres = rng.standard_normal(p) + rng.standard_normal((sizes.outer, p))
    inner_data = Rows(hessians, mixed, slopes)
    outer_data = Rows(targets, centres, np.arange(sizes.outer))

    def inner(z, x, batch):
        terms = batch.x @ z / 2 + batch.y @ x - batch.row
        return jnp.mean(terms @ z)

    def outer(z, x, batch):
        away = jnp.sum((z - batch.x) ** 2, 1) / 2 + 0.05 * jnp.sum((x - batch.y) ** 2, 1)
        return jnp.mean(away)

    h, b, s = (np.mean(a, 0) for a in inner_data)
    response = -np.linalg.solve(h, b)

    @jax.jit
    def measure(x):
        z = jnp.linalg.solve(h, s - b @ x)
        of_z, of_x = jax.grad(outer, (0, 1))(z, x, outer_data)
        grad = of_x + response.T @ of_z
        return {
            "value": outer(z, x, outer_data),
            "grad": grad,
            "residual": jnp.max(jnp.abs(h @ z + b @ x - s)),
            "error": jnp.nan,
        }

    zero = np.zeros(p)
    slope, curvature = measure(zero)["grad"], response.T @ response + 0.1 * np.eye(p)
    least = float(measure(zero - np.linalg.solve(curvature, slope))["value"])
    return Task(outer, inner, np.zeros(d), zero, outer_data, inner_data, 64, measure, least, None)


def with_least(task: Task, starts: list[Any]) -> Task:
    """The task with its least h, found by BFGS in double precision on the exact h.

    h may have several minima, or fall for ever towards infinite theta: the least value is that of
    the best start.

    Args:
        task: The task.
        starts: Where BFGS begins.
    """
    if task.least is not None:
        return task

    def both(theta):
        found = task.measure(theta)
        return float(found["value"]), np.asarray(found["grad"])

    def end(start):
        options = {"gtol": 1e-10, "maxiter": 300}
        return scipy.optimize.minimize(
            both, np.asarray(start), jac=True, method="BFGS", options=options
        )

    return task._replace(least=min(float(end(start).fun) for start in starts))

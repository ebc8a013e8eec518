"""The outer loop: an estimator and any optax optimizer, in dispatches of many steps."""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from unrollgrad._checks import arguments
from unrollgrad._core.progress import progress_bar
from unrollgrad._fit import checkpoints
from unrollgrad._fit.data_thread import prefetched
from unrollgrad._fit.interrupts import stop_requests
from unrollgrad._workers.mesh import on_any_process, placed
from unrollgrad.types import GradientEstimator, Key, Theta, WorkerState

_INIT, _EVALUATE = 0x696E6974, 0x6576616C  # folded into the key, numbers that no step has


class FitResult(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        theta: After the last step.
        opt_state: The outer optimizer's.
        worker_state: The estimator's.
        history: Arrays by name. One number per outer step: ``loss`` (the estimate, before the
            update), ``grad_norm`` and what the estimator's ``info`` holds. One per evaluation:
            ``evaluated_at``, the number of steps done, and what ``evaluate`` returned.
    """

    theta: Theta
    opt_state: optax.OptState
    worker_state: WorkerState
    history: dict[str, np.ndarray]


class _Carry(NamedTuple):
    theta: Theta
    opt_state: optax.OptState
    worker_state: WorkerState


class _Run(NamedTuple):
    carry: _Carry
    done: int
    steps: list[dict[str, np.ndarray]]  # the records of one dispatch after another
    evaluations: list[dict[str, np.ndarray]]

    def history(self) -> dict[str, dict[str, np.ndarray]]:
        """Both kinds of records joined; without those of which there are none."""
        parts = {"steps": self.steps, "evaluations": self.evaluations}
        return {
            name: {k: np.concatenate([r[k] for r in records]) for k in records[0]}
            for name, records in parts.items()
            if records
        }

    def result(self) -> FitResult:
        """What there is so far."""
        history = self.history()
        flat = history.get("steps", {}) | history.get("evaluations", {})
        return FitResult(self.carry.theta, self.carry.opt_state, self.carry.worker_state, flat)


def fit(
    estimator: GradientEstimator,
    theta: Theta,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    key: Key,
    data: Callable[[int], Any] | Iterator[Any] | None = None,
    steps_per_dispatch: int = 100,
    evaluate: Callable[[Key, Theta], dict[str, Any]] | None = None,
    callback: Callable[[int, Theta, dict[str, Any]], None] | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    config: Any = None,
) -> FitResult:
    """Minimises J by ``num_steps`` outer steps: estimate, optax update, apply.

    Step s, counted from 0, uses ``fold_in(key, s)``. ``steps_per_dispatch`` steps are one program
    and one dispatch; between dispatches, and only there, theta is evaluated, the callback called,
    checkpoints are written and, on a terminal, the progress shown. Everything is compiled once.

    With ``checkpoint_dir`` the same call on a folder that is not empty goes on where the last
    checkpoint was, bit for bit on the same devices; ``num_steps`` may have grown. Ctrl-C and
    SIGTERM let the running dispatch end, save, and return what there is (a second one interrupts).

    Time: that of the estimates and updates. Memory: theta, optimizer state and worker state once,
    as their buffers are handed on (theta and optimizer state twice inside a step, so that a step
    that fails changes nothing), and once more while a checkpoint is written in the background; with
    ``data`` two dispatches' batches.

    Of several processes all make the same call, with a mesh over all; a signal to one stops all.

    Args:
        estimator: Of the gradient, as a rule an ``average``. Spread over a mesh, theta and the
            optimizer's state are replicated over it.
        theta: Where to begin; it is copied.
        optimizer: Any optax transformation whose update needs no more than gradient, theta and
            ``value=loss``: no line search, which would have to call the loss.
        num_steps: Outer steps, those before a checkpoint included.
        key: Of everything that is drawn.
        data: Streamed batches, one outer step's worth each, as ``estimate(data=)`` wants them: a
            function of the step, or an iterator, of which a continued run wants a fresh one: it
            takes and leaves what was used already. Both are called in a thread of their own while
            the device computes.
        steps_per_dispatch: Outer steps in one program.
        evaluate: ``evaluate(key, theta) -> {name: number or array}`` after every dispatch, always
            the same names and shapes, none that is in the history already. ``jit`` it yourself.
        callback: ``callback(s, theta, metrics)`` after every dispatch: the number of steps done,
            and the last step's record with what ``evaluate`` returned.
        checkpoint_dir: Where to write checkpoints, and to go on from the last. The last two are
            kept, and the one whose last dispatch had the least mean loss. Needs orbax.
        checkpoint_every: Outer steps between checkpoints, rounded up to dispatches; one more is
            written at the end. Default: ten dispatches.
        config: Anything that JSON can hold; a run goes on only with the same.

    Returns:
        A ``FitResult``.

    Raises:
        FloatingPointError: If theta or its gradient is not finite, with the step and the leaf.
        TypeError: If an argument is not what it should be.
        ValueError: If a number is not positive, an iterator of data ends early, ``evaluate``
            returns other names than before, or the checkpoint is that of another run, with the
            differences, or beyond num_steps.
        OSError: If a checkpoint cannot be written or read.
        RuntimeError: If another process has the folder.

    Whatever is raised between dispatches has the result so far as its attribute ``result``; where
    something is not finite that is theta before the failing step, with the workers after it.

    Example:
        >>> import jax, optax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> pes = ug.average(ug.pes(problem, truncation=1, sigma=0.1), 100)
        >>> result = ug.fit(pes, theta, optax.sgd(1e-4), num_steps=200, key=jax.random.key(0))
        >>> result.history["loss"].shape
        (200,)
    """
    _check(estimator, optimizer, data)
    num_steps = arguments.positive_int("num_steps", num_steps)
    size = arguments.positive_int("steps_per_dispatch", steps_per_dispatch)
    every = 10 * size
    if checkpoint_every is not None:
        every = arguments.positive_int("checkpoint_every", checkpoint_every)
    key, theta, config = arguments.typed_key(key), arguments.floating_theta(theta), _as_json(config)
    with checkpoints.opened(checkpoint_dir) as store, stop_requests() as stop:
        run = _Run(_begin(estimator, theta, optimizer, key), 0, [], [])
        about = {} if store is None else checkpoints.about(run.carry, key, config)
        if store is not None and store.latest is not None:
            carry, history = store.restore(run.carry, about)
            kept = [[history[k]] if k in history else [] for k in ("steps", "evaluations")]
            run = _Run(carry, store.latest, *kept)
            if run.done > num_steps:
                raise ValueError(
                    f"`num_steps` is {num_steps}, but the run in {store.folder} has done {run.done}"
                    " steps. Ask for as many or more, or use another checkpoint_dir."
                )
        saved, stopping = run.done, False
        try:
            with (
                prefetched(data, run.done, num_steps, size) as batches,
                progress_bar(num_steps, "steps") as progress,
            ):
                while run.done < num_steps and not stopping:
                    number = min(size, num_steps - run.done)
                    batch = next(batches)
                    run, finite = _dispatched(estimator, optimizer, size, key, run, number, batch)
                    if not all(jax.tree.leaves(finite)):
                        raise FloatingPointError(_not_finite(finite, run.done))
                    metrics = {k: x[-1] for k, x in run.steps[-1].items()}
                    # A copy, which may be kept: the next dispatch takes over the buffers.
                    seen = evaluate is not None or callback is not None
                    here = jax.tree.map(jnp.copy, run.carry.theta) if seen else None
                    if evaluate is not None:
                        at = jax.random.fold_in(jax.random.fold_in(key, _EVALUATE), run.done)
                        found = _checked(evaluate(at, here), run)
                        row = {"evaluated_at": np.asarray(run.done), **found}
                        run.evaluations.append({k: x[None] for k, x in row.items()})
                        metrics |= found
                    if callback is not None:
                        callback(run.done, here, metrics)
                    stopping = on_any_process(bool(stop))
                    ends = run.done == num_steps or stopping
                    if store is not None and (ends or run.done - saved >= every):
                        loss = float(np.mean(run.steps[-1]["loss"]))
                        store.save(run.done, run.carry, run.history(), about, loss)
                        saved = run.done
                    progress(f"loss {metrics['loss']:.4g}", run.done)
                if store is not None:
                    store.finish()
        except BaseException as error:
            _explain(error, run, store)
            raise
    if stopping:
        by = stop[0] if stop else "another process"
        print(f"fit: stopped by {by} after step {run.done} of {num_steps}", file=sys.stderr)
    return run.result()


def _explain(error: BaseException, run: _Run, store: Any) -> None:
    """Gives whatever is raised the result so far, and says where the last checkpoint is."""
    if not any(x.is_deleted() for x in jax.tree.leaves(run.carry)):
        error.result = run.result()  # type: ignore[attr-defined]
        error.add_note(f"fit: the result of the {run.done} steps so far is this error's `result`.")
    if store is not None and (saved := store.newest()) is not None:
        error.add_note(f"fit: the last checkpoint is that of step {saved}, in {store.folder}.")


def _check(estimator: Any, optimizer: Any, data: Any) -> None:
    if not isinstance(estimator, GradientEstimator):
        raise TypeError(
            "`estimator` must be a GradientEstimator such as ug.average(ug.pes(problem, ...), 64); "
            f"got a {type(estimator).__name__}."
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"`optimizer` must be an optax transformation such as optax.adam(1e-3); got a "
            f"{type(optimizer).__name__}."
        )
    if data is not None and not callable(data) and not isinstance(data, Iterator):
        raise TypeError(
            "`data` must be a function of the step or an iterator, of one step's batches each; got "
            f"a {type(data).__name__}. For a list of batches: `lambda step: batches[step]`."
        )


def _as_json(config: Any) -> Any:
    """The configuration as a file gives it back."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`config` must be what JSON can hold (dicts, lists, text, finite numbers): {error}. "
            "Convert it, a dataclass by dataclasses.asdict, the rest by str or float."
        ) from error


def _checked(found: Any, run: _Run) -> dict[str, np.ndarray]:
    """What ``evaluate`` returned, as arrays."""
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise TypeError(
            f"`evaluate` must return a dict of numbers by name, such as {{'test_loss': 0.1}}; got "
            f"{type(found).__name__} {found!r:.100}."
        )
    taken = sorted({"evaluated_at", *run.steps[-1]} & set(found))
    if taken:
        raise ValueError(f"`evaluate` returns {taken}, which `fit` records itself; rename it.")
    values = {name: np.asarray(x) for name, x in jax.device_get(found).items()}
    for name, x in values.items():
        if not jnp.issubdtype(x.dtype, np.number) and x.dtype != bool:
            raise TypeError(f"`evaluate` must return numbers; {name!r} is {found[name]!r:.100}.")
    if run.evaluations:
        before = {k: x.shape[1:] for k, x in run.evaluations[-1].items() if k != "evaluated_at"}
        now = {k: x.shape for k, x in values.items()}
        if now != before:
            raise ValueError(
                "`evaluate` must return the same names and shapes every time, since they become "
                f"arrays in the history; before {before}, now {now}."
            )
    return values


def _begin(estimator: GradientEstimator, theta: Theta, optimizer: Any, key: Key) -> _Carry:
    """What the first dispatch takes, in buffers of its own, laid out as those that come back."""
    worker_state = estimator.init(jax.random.fold_in(key, _INIT), theta)
    layouts = {x.sharding for x in jax.tree.leaves(worker_state)}
    meshes = {s.mesh for s in layouts if isinstance(s, NamedSharding)}
    whole = NamedSharding(meshes.pop(), PartitionSpec()) if meshes else None

    def own(x):
        x = jnp.copy(arguments.strong(x))
        return x if whole is None else placed(x, whole)

    theta, opt_state = jax.tree.map(own, (theta, optimizer.init(theta)))
    # The workers' states too: a problem's `init` may return an array that is the user's.
    return _Carry(theta, opt_state, jax.tree.map(lambda x: x.copy(), worker_state))


def _dispatched(
    estimator: GradientEstimator,
    optimizer: Any,
    size: int,
    key: Key,
    run: _Run,
    number: int,
    batch: Any,
) -> tuple[_Run, dict[str, Any]]:
    """The run ``number`` steps on, or fewer; and what was finite in the last."""
    program = _program(estimator, optimizer, size)
    carry, count, records, finite = program(run.carry, key, run.done, number, batch)
    count = int(count)
    run.steps.append({k: np.array(x[:count]) for k, x in jax.device_get(records).items()})
    return run._replace(carry=carry, done=run.done + count), finite


def _not_finite(finite: dict[str, Any], step: int) -> str:
    bad = [
        f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
        for path, ok in jax.tree_util.tree_leaves_with_path(finite)
        if not ok
    ]
    return (
        f"not finite in outer step {step}: {', '.join(bad)}. Lower the learning rate or sigma, "
        "clip the gradient (optax.clip_by_global_norm), or look at history['num_nonfinite']."
    )


@functools.lru_cache(maxsize=1)
def _program(estimator, optimizer, size):
    """``_dispatch``, compiled; the last is kept for another call, and no more of them in memory."""
    return jax.jit(functools.partial(_dispatch, estimator, optimizer, size), donate_argnums=(0,))


def _dispatch(estimator, optimizer, size, carry, key, first, number, data):
    """Runs up to ``number`` of ``size`` steps, less where one is not finite.

    Returns:
        The carry; how many steps were done; the records, arrays of ``size``; and the leaves of the
        failing step's gradient and new theta that are finite.
    """

    def step(i, carry):
        given = {} if data is None else {"data": jax.tree.map(lambda x: x[i], data)}
        at = jax.random.fold_in(key, first + i)
        estimate, worker_state = estimator.estimate(at, carry.theta, carry.worker_state, **given)
        # Wrapped here and not before, so that jit finds its program again in another call of fit.
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            estimate.grad, carry.opt_state, carry.theta, value=estimate.loss
        )
        theta = optax.apply_updates(carry.theta, updates)
        record = {
            "loss": estimate.loss,
            "grad_norm": optax.tree.norm(estimate.grad),
            **estimate.info._asdict(),
        }
        finite = {"gradient": estimate.grad, "theta": theta}
        finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), finite)
        return _Carry(theta, opt_state, worker_state), record, finite

    _, record, finite = jax.eval_shape(step, jnp.int32(0), carry)
    records = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), record)
    finite = jax.tree.map(lambda x: jnp.ones((), bool), finite)

    def every(finite):
        return jnp.all(jnp.stack(jax.tree.leaves(finite)))

    def goes_on(loop):
        i, _, _, finite = loop
        return (i < number) & every(finite)

    def body(loop):
        i, carry, records, _ = loop
        after, record, finite = step(i, carry)
        good = every(finite)

        def unless_bad(new, old):
            # With x64 some optimizers make float64 of their float32 states.
            return jnp.where(good, new if new.dtype == old.dtype else new.astype(old.dtype), old)

        theta, opt_state = jax.tree.map(unless_bad, after[:2], carry[:2])
        after = _Carry(theta, opt_state, after.worker_state)
        records = jax.tree.map(lambda xs, x: xs.at[i].set(x), records, record)
        return i + good.astype(i.dtype), after, records, finite

    i, carry, records, finite = jax.lax.while_loop(
        goes_on, body, (jnp.int32(0), carry, records, finite)
    )
    return carry, i, records, finite

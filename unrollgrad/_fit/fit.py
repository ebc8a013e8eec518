"""The outer loop: an estimator and an optax optimizer, many outer steps per compiled program."""

import dataclasses
import functools
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import descriptions
from unrollgrad._core.contexts import own_transfers
from unrollgrad._core.dtypes import standard_promotion
from unrollgrad._core.progress import progress_bar
from unrollgrad._fit import checkpoints
from unrollgrad._fit.data_thread import prefetched
from unrollgrad._fit.interrupts import stop_requests
from unrollgrad._fit.result import FitResult
from unrollgrad._training import inner_optimizers
from unrollgrad._workers.mesh import on_any_process, placed
from unrollgrad.types import ArrayTree, GradientEstimator, Key, Numeric, Theta, WorkerState

_INIT, _EVALUATE = 0x696E6974, 0x6576616C  # folded into the key; no step has these numbers


class _Carry(NamedTuple):
    theta: Any
    opt_state: optax.OptState
    worker_state: WorkerState


class _Steps(NamedTuple):
    """The outer steps of one dispatch: ``number`` steps from step ``first`` on."""

    key: Key
    first: Numeric
    number: Numeric
    data: ArrayTree | None  # one step's batches per entry of the leading axis


@dataclasses.dataclass
class _Run:
    """A call of ``fit`` after ``done`` outer steps."""

    carry: _Carry
    done: int
    records: dict[str, list[dict[str, np.ndarray]]]  # "steps", by dispatch, and "evaluations"

    def history(self) -> dict[str, dict[str, np.ndarray]]:
        """The records, concatenated."""
        return {
            kind: {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}
            for kind, rows in self.records.items()
        }

    def result(self) -> FitResult:
        """The result so far; the names after ``evaluated_at`` are those of ``evaluate``."""
        history = self.history()
        flat, evaluations = (dict(history.get(kind, {})) for kind in ("steps", "evaluations"))
        if evaluations:
            flat |= {"evaluated_at": evaluations.pop("evaluated_at"), **evaluations}
        return FitResult(*self.carry, flat)


def fit(
    estimator: GradientEstimator,
    theta: Theta,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    key: Key,
    data: Callable[..., object] | Iterator[object] | None = None,
    steps_per_dispatch: int = 100,
    evaluate: Callable[..., dict[str, Any]] | None = None,
    callback: Callable[..., object] | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    config: object = None,
) -> FitResult:
    """Minimises J by ``num_steps`` outer steps: estimate, optax update, apply.

    Step s, counted from 0, uses ``fold_in(key, s)``. A dispatch runs ``steps_per_dispatch`` steps
    in one program, which is compiled once. Only between dispatches, ``fit`` evaluates theta, calls
    the callback, writes checkpoints and, on a terminal, shows the progress.

    With ``checkpoint_dir``, the same call on a folder that holds checkpoints resumes from the last
    one, bit for bit on the same devices; ``num_steps`` may have grown. On Ctrl-C or SIGTERM ``fit``
    finishes the running dispatch, saves, and returns the result so far; a second one interrupts.

    Time: the estimates and updates. Memory: one copy of theta, optimizer state and worker state,
    since their buffers are donated (theta and optimizer state twice inside a step, so that a step
    that fails changes nothing), a second copy while a checkpoint is written in the background, and
    with ``data`` the batches of two dispatches.

    With several processes, every process makes the same call, with a mesh over all devices; a
    signal to one process stops them all.

    Args:
        estimator: The gradient estimator, usually an ``average``. If its workers are spread over a
            mesh, theta and the optimizer's state are replicated over it.
        theta: Initial outer parameters; they are copied.
        optimizer: An optax transformation whose update needs only gradient, theta and
            ``value=loss``; a line search, which calls the loss, does not work.
        num_steps: Outer steps in total, including those before a checkpoint.
        key: The key from which all randomness is drawn.
        data: Streamed batches for ``estimate(data=)``, one outer step's worth each: a function of
            the step, or an iterator. When resuming, pass a fresh iterator; batches already used are
            skipped. Both are called in a separate thread while the device computes.
        steps_per_dispatch: Outer steps in one program.
        evaluate: ``evaluate(key, theta) -> {name: number or array}``, called after every dispatch.
            The names and shapes stay the same; no name is in the history already. ``jit`` it
            yourself.
        callback: ``callback(s, theta, metrics)``, called after every dispatch with the number of
            steps done, and the last step's record joined with the values of ``evaluate``. If it
            returns True, ``fit`` stops there, as after a signal: it saves, and returns the result
            so far. (The same call on the same folder would go on from there.)
        checkpoint_dir: Folder in which checkpoints are written and found. It keeps the last two and
            the one whose last dispatch had the lowest mean loss. Needs orbax.
        checkpoint_every: Outer steps between checkpoints, rounded up to dispatches (by default ten
            dispatches); one more is written at the end.
        config: Any JSON value; a run resumes only with an equal one.

    Raises:
        FloatingPointError: If theta or its gradient is not finite, with the step and the leaf.
        TypeError: If an argument has the wrong type.
        ValueError: If a number is not positive, an iterator of data ends early, ``evaluate``
            changes its names, or the checkpoint belongs to another run (the message lists the
            differences) or is beyond num_steps.
        OSError: If a checkpoint cannot be written or read.
        RuntimeError: If another process uses the folder.

    An exception raised between dispatches has the result so far as its attribute ``result``; if
    something is not finite, this is theta before the failing step, with the workers after it.

    Example:
        >>> import jax, optax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> pes = ug.average(ug.pes(problem, truncation=1, sigma=0.1), 100)
        >>> result = ug.fit(pes, theta, optax.sgd(1e-4), num_steps=200, key=jax.random.key(0))
        >>> result.history["loss"].shape
        (200,)
    """
    _check(estimator, optimizer, data)
    _check_calls(data, evaluate, callback)
    num_steps = arguments.positive_int("num_steps", num_steps)
    size = arguments.positive_int("steps_per_dispatch", steps_per_dispatch)
    every = 10 * size if checkpoint_every is None else checkpoint_every
    every = arguments.positive_int("checkpoint_every", every)
    with own_transfers():
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    config = _as_json(config)
    _check_not_traced((key, theta), "`theta` or `key`")
    program = _program(estimator, optimizer, size)
    stopping = asked = False
    with checkpoints.opened(checkpoint_dir) as store, stop_requests() as stop:
        carry = _begin(estimator, theta, optimizer, key)
        about = {} if store is None else checkpoints.about(carry, key, config)
        found = None if store is None else store.restore(carry, about, num_steps)
        saved, carry, history = found or (0, carry, {})
        run = _Run(carry, saved, {kind: [rows] for kind, rows in history.items()})
        try:
            with (
                prefetched(data, run.done, num_steps, size) as batches,
                progress_bar(num_steps, "steps") as progress,
            ):
                while run.done < num_steps and not stopping:
                    number = np.int32(min(size, num_steps - run.done))
                    steps = _Steps(key, np.int32(run.done), number, next(batches))
                    _advance(run, program, steps)
                    asked = _observe(run, key, evaluate, callback)
                    stopping = on_any_process(bool(stop) or asked)
                    ends = run.done == num_steps or stopping
                    losses = run.records["steps"][-1]["loss"]
                    if store is not None and (ends or run.done - saved >= every):
                        loss = float(np.mean(losses))
                        store.save(run.done, run.carry, run.history(), about, loss)
                        saved = run.done
                    progress(f"loss {losses[-1]:.4g}", run.done)
                if store is not None:
                    store.finish()
        except BaseException as error:
            _explain(error, run, store)
            explain = descriptions.about(estimator).explain
            if explain and isinstance(error, FloatingPointError) and "steps" in run.records:
                error.add_note(f"fit: {explain(run.history()['steps'])}")
            raise
    if stopping and not asked:
        by = stop[0] if stop else "another process"
        print(f"fit: stopped by {by} after step {run.done} of {num_steps}", file=sys.stderr)
    return run.result()


def _advance(run: _Run, program: Callable[..., tuple], steps: _Steps) -> None:
    """Runs one dispatch; raises FloatingPointError after one that ended before its last step."""
    with own_transfers():
        carry, *out = program(run.carry, steps)
        carry = jax.tree.map(_laid_out_like, carry, run.carry)
    _check_not_traced(out, "number in `estimator` or `optimizer`")
    count, records, finite = jax.device_get(out)
    record = {k: x[:count] for k, x in records.items()}
    # Only now, since an interrupt may come while the device computes.
    run.carry, run.done = carry, run.done + int(count)
    run.records.setdefault("steps", []).append(record)
    if count == steps.number:
        return
    bad = [
        f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
        for path, ok in jax.tree_util.tree_leaves_with_path(finite)
        if not ok
    ]
    raise FloatingPointError(
        f"not finite in outer step {run.done}: {', '.join(bad)}. Lower the learning rate or "
        "sigma, clip the gradient (optax.clip_by_global_norm), or look at "
        "history['num_nonfinite']."
    )


def _laid_out_like(x: jax.Array, before: jax.Array) -> Any:
    """The array as it lay before: on a mesh of several axes XLA may have spread it otherwise."""
    return placed(x, before.sharding) if isinstance(before.sharding, NamedSharding) else x


def _observe(run: _Run, key: Key, evaluate, callback) -> bool:
    """Evaluates theta, records the values, and calls the callback; whether that asks to stop."""
    if evaluate is None and callback is None:
        return False
    # A copy, which the user may keep: the next dispatch takes over the buffers.
    theta = jax.tree.map(jnp.copy, run.carry.theta)
    metrics = {k: x[-1] for k, x in run.records["steps"][-1].items()}
    if evaluate is not None:
        with own_transfers():
            at = jax.random.fold_in(jax.random.fold_in(key, _EVALUATE), run.done)
        found = _checked(evaluate(at, theta), run)
        row = {"evaluated_at": np.asarray(run.done), **found}
        run.records.setdefault("evaluations", []).append({k: x[None] for k, x in row.items()})
        metrics |= found
    said = None if callback is None else callback(run.done, theta, metrics)
    # Other values than True and False do not count: a lambda may return what it logged.
    return arguments.dtype_of(said) == np.bool_ and bool(said)


def _explain(error: BaseException, run: _Run, store: checkpoints.Checkpoints | None) -> None:
    """Adds the result so far to an exception, and says where the last checkpoint is."""
    if not any(x.is_deleted() for x in jax.tree.leaves(run.carry)):
        error.result = run.result()  # type: ignore[attr-defined]
        if run.done:
            error.add_note(f"fit: the result of the {run.done} steps so far is its `result`.")
    if store is not None and (saved := store.newest()) is not None:
        error.add_note(f"fit: the last checkpoint is that of step {saved}, in {store.folder}.")


def _check_not_traced(tree: object, what: str) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        raise TypeError(
            "`fit` is a loop of compiled programs, which cannot run inside jit, vmap or grad; got "
            f"a traced {what}. Call it for each of them in a Python loop, or scan over "
            "`estimator.estimate` yourself."
        )


def _check(estimator: object, optimizer: object, data: object) -> None:
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


def _check_calls(data: object, evaluate: Any, callback: Any) -> None:
    """Raises TypeError unless the functions of the user can be called as ``fit`` calls them."""
    if callable(data):
        inner_loop.check_call("data", data, step=0)
    if evaluate is not None:
        inner_loop.check_call("evaluate", evaluate, key=None, theta=None)
    if callback is not None:
        inner_loop.check_call("callback", callback, s=0, theta=None, metrics=None)


def _as_json(config: object) -> object:
    """The configuration as it is read back from a file."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`config` must be what JSON can hold (dicts, lists, text, finite numbers): {error}. "
            "Convert it, a dataclass by dataclasses.asdict, the rest by str or float."
        ) from error


def _checked(found: object, run: _Run) -> dict[str, np.ndarray]:
    """The values of ``evaluate`` as arrays."""
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise TypeError(
            f"`evaluate` must return a dict of numbers by name, such as {{'test_loss': 0.1}}; got "
            f"{type(found).__name__} {found!r:.100}."
        )
    taken = sorted({"evaluated_at", *run.records["steps"][-1]} & set(found))
    if taken:
        raise ValueError(f"`evaluate` returns {taken}, which `fit` records itself; rename it.")
    values = {name: np.asarray(x) for name, x in jax.device_get(found).items()}
    for name, x in values.items():
        if (not jnp.issubdtype(x.dtype, np.number) and x.dtype != bool) or not x.size:
            raise TypeError(f"`evaluate` must return numbers; {name!r} is {found[name]!r:.100}.")
    if rows := run.records.get("evaluations"):
        before = {k: x.shape[1:] for k, x in rows[-1].items() if k != "evaluated_at"}
        now = {k: x.shape for k, x in values.items()}
        if now != before:
            raise ValueError(
                "`evaluate` must return the same names and shapes every time, since they become "
                f"arrays in the history; before {before}, now {now}."
            )
    return values


@own_transfers()
def _begin(
    estimator: GradientEstimator, theta: Theta, optimizer: optax.GradientTransformation, key: Key
) -> _Carry:
    """The initial carry, in buffers of its own and in the layout that a dispatch returns."""
    worker_state = estimator.init(jax.random.fold_in(key, _INIT), theta)
    layouts = {x.sharding for x in jax.tree.leaves(worker_state)}
    spread = [s for s in layouts if isinstance(s, NamedSharding) and s.spec]

    def own(x):
        x = jnp.copy(arguments.strong(x))
        if not spread:
            return x
        return placed(x, NamedSharding(spread[0].mesh, PartitionSpec()), spread[0].spec[0])

    opt_state = optimizer.init(theta)
    inner_optimizers.check_injected("`optimizer`", optimizer.init, theta, opt_state)
    theta, opt_state = jax.tree.map(own, (theta, opt_state))
    # Worker states are copied too: a problem's `init` may return an array that is the user's.
    return _Carry(theta, opt_state, jax.tree.map(lambda x: x.copy(), worker_state))


_PROGRAMS: weakref.WeakKeyDictionary[Callable, Callable[..., Callable[..., tuple]]]
_PROGRAMS = weakref.WeakKeyDictionary()


def _program(estimator, optimizer, size) -> Callable[..., tuple]:
    """``_dispatch``, compiled; the last programs of an estimator are kept as long as it lives."""
    try:
        # The program refers weakly to the estimator, which would otherwise never be freed.
        estimate = weakref.ref(estimator.estimate)
    except TypeError:  # a callable of the user without weak references
        program = functools.partial(_dispatch, lambda: estimator.estimate, optimizer, size)
        return jax.jit(program, donate_argnums=(0,))

    @functools.lru_cache(maxsize=4)
    def compiled(optimizer, size):
        return jax.jit(functools.partial(_dispatch, estimate, optimizer, size), donate_argnums=(0,))

    return _PROGRAMS.setdefault(estimator.estimate, compiled)(optimizer, size)


def _dispatch(estimate, optimizer, size, carry, steps):
    """Runs ``steps``, at most ``size`` of them, and stops at one that is not finite.

    Returns:
        The carry; the number of steps done; their records, arrays of length ``size``; and for each
        leaf of the last step's gradient and new theta whether it is finite.
    """
    key, first, number, data = steps
    # All at once: drawing one key takes a microsecond, as long as a tiny problem's inner step.
    keys = jax.vmap(lambda i: jax.random.fold_in(key, first + i))(jnp.arange(size, dtype=jnp.int32))

    def step(i, carry):
        at = keys[i]
        given = {} if data is None else {"data": jax.tree.map(lambda x: x[i], data)}
        return _step(estimate(), optimizer, at, carry, given)

    _, record, finite = jax.eval_shape(step, jnp.int32(0), carry)
    records = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), record)
    finite = jax.tree.map(lambda x: jnp.ones((), bool), finite)

    def body(loop):
        i, _, carry, records, _ = loop
        after, record, finite = step(i, carry)
        good = jnp.all(jnp.stack(jax.tree.leaves(finite)))

        def unless_bad(new, old):
            # With x64 some optimizers make float64 of their float32 states.
            return jnp.where(good, new if new.dtype == old.dtype else new.astype(old.dtype), old)

        theta, opt_state = jax.tree.map(unless_bad, after[:2], carry[:2])
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        records = jax.tree.map(put, records, record)
        after = _Carry(theta, opt_state, after.worker_state)
        return i + good.astype(i.dtype), good, after, records, finite

    begin = (jnp.int32(0), jnp.bool_(True), carry, records, finite)
    i, _, carry, records, finite = jax.lax.while_loop(
        lambda loop: (loop[0] < number) & loop[1], body, begin
    )
    return carry, i, records, finite


def _step(estimate, optimizer, key, carry, given):
    """One outer step: the carry, the record, and which leaves are finite."""
    estimated, worker_state = estimate(key, carry.theta, carry.worker_state, **given)
    # Wrapped here and not before, so that jit finds its program again in another call of fit.
    transform = optax.with_extra_args_support(optimizer)
    try:
        with standard_promotion():
            updates, opt_state = transform.update(
                estimated.grad, carry.opt_state, carry.theta, value=estimated.loss
            )
            theta = optax.apply_updates(carry.theta, updates)
    except TypeError as error:
        if "value_fn" not in str(error):
            raise
        raise TypeError(
            "`optimizer` is a line search, which computes the loss itself; `fit` has only an "
            "estimate of it. Use an optimizer without one, such as optax.adam(1e-2)."
        ) from error
    norm = optax.tree.norm(estimated.grad)
    record = {"loss": estimated.loss, "grad_norm": norm, **estimated.info._asdict()}
    finite = {"gradient": estimated.grad, "theta": theta}
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), finite)
    return _Carry(theta, opt_state, worker_state), record, finite

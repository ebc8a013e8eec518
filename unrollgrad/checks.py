"""Arguments are checked here, before anything compiles.

Every message says which argument, which values it had, at which leaf, and one way out.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad.types import Key, State, Theta, UnrolledProblem


def typed_key(key: Key) -> Key:
    """Returns ``key`` as a typed key; wraps a raw uint32 one.

    Raises:
        TypeError: If ``key`` is neither.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise TypeError(
                f"`key` must be a single PRNG key; got an array of keys of shape {key.shape}. "
                "Split it and vmap, or pass one of them."
            )
        return key
    if getattr(key, "dtype", None) == np.uint32 and np.ndim(key) == 1:
        try:
            return jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError as error:
            raise TypeError(
                f"`key` is raw key data, {describe(key)}, of another implementation than the "
                "default; wrap it yourself: jax.random.wrap_key_data(key, impl=...)."
            ) from error
    raise TypeError(f"`key` must be a PRNG key such as jax.random.key(0); got {describe(key)}.")


def floating_theta(theta: Theta) -> Theta:
    """Returns theta with every leaf a strongly typed floating array.

    Raises:
        ValueError: If theta has no leaves.
        TypeError: If a leaf is not floating.
    """
    return floating(
        "theta",
        theta,
        "Move it out of theta (into the problem's closure or the inner state), or make it "
        "floating.",
        what="outer parameters",
    )


def floating(name: str, tree: Any, advice: str, what: str = "they") -> Any:
    """Returns the tree with every leaf a strongly typed floating array.

    Raises:
        ValueError: If it has no leaves, or an empty one.
        TypeError: If a leaf is not floating.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(
            f"`{name}` has no floating leaves; got {tree!r}. Pass the parameters to be tuned."
        )
    for path, leaf in leaves:
        if not jnp.issubdtype(dtype_of(leaf), jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {describe(leaf)}; {what} must be "
                f"real floating-point arrays. {advice}"
            )
        if np.size(leaf) == 0:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is empty: {describe(leaf)}. Remove the leaf."
            )
    return jax.tree.map(strong, tree)


def shape_difference(expected: Any, got: Any) -> str | None:
    """Where the shapes of two trees first differ, and how; None if they do not."""

    def shapes(tree):
        named = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.shape(x) for path, x in named}

    a, b = shapes(expected), shapes(got)
    for path in [*a, *b]:
        if a.get(path) != b.get(path):
            return f"{path}: expected {a.get(path, 'nothing')}, got {b.get(path, 'nothing')}"
    return None


def strong_state(state: State, made_by: str) -> State:
    """Returns the inner state with every leaf a strongly typed array.

    Raises:
        TypeError: If a leaf is not an array (a function in an equinox module, a string).
    """

    def leaf(path, x):
        try:
            return strong(x)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`{made_by}` put {describe(x)} at state{jax.tree_util.keystr(path)}; the inner "
                "state may hold arrays and PRNG keys only. Keep the rest in a closure (equinox: "
                "`eqx.partition(model, eqx.is_array)`; flax: keep the module outside, its params "
                "inside)."
            ) from error

    return jax.tree_util.tree_map_with_path(leaf, state)


def strong(x: Any) -> jax.Array:
    """Returns ``x`` as an array whose dtype is not weak."""
    if isinstance(x, jax.Array) and getattr(x, "weak_type", True) is False:
        return x
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype)


def dtype_of(x: Any) -> Any:
    """The dtype ``x`` has or would have as an array; object where it cannot be one."""
    if hasattr(x, "dtype"):
        return x.dtype
    return jnp.result_type(x) if isinstance(x, bool | int | float | complex) else np.dtype(object)


def describe(x: Any) -> str:
    """Describes a leaf: ``float32[3,2]``, or its type where it is not an array."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"{x!r} ({type(x).__name__})"


def positive_int(name: str, value: Any, note: str = "") -> int:
    """Returns ``value`` as an int; ``note`` ends the message where it is none.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is below one.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"`{name}` must be a whole number; got {value!r} ({type(value).__name__}).{note}"
        )
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {name}={value}.{note}")
    return int(value)


def number(name: str, value: Any) -> Any:
    """Returns a number that, where it is known, is finite and at least 0.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if np.ndim(value) != 0 or not jnp.issubdtype(dtype_of(value), np.number):
        raise TypeError(f"`{name}` must be a number; got {describe(value)}.")
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be at least 0 and finite; got {value}.")
    return value


def num_devices(devices: Any) -> int:
    """Returns the number of devices asked for as an int.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is below one, or jax sees fewer.
    """
    devices = positive_int("devices", devices)
    if devices > jax.device_count():
        raise ValueError(
            f"`devices` is {devices}, but jax sees {jax.device_count()}. For more CPU devices call "
            f'jax.config.update("jax_num_cpu_devices", {devices}) before anything is computed.'
        )
    return devices


def check_problem(problem: Any) -> None:
    """Raises TypeError if ``problem`` is no ``UnrolledProblem``."""
    if not isinstance(problem, UnrolledProblem):
        hint = ""
        if hasattr(problem, "problem") and hasattr(problem, "theta"):
            hint = " Unpack it: `problem, theta, *_ = ...`."
        raise TypeError(
            f"`problem` must be an UnrolledProblem(init, step, horizon); got a "
            f"{type(problem).__name__}.{hint}"
        )


def static_horizon(problem: UnrolledProblem, needed_by: str) -> int:
    """Returns the horizon as an int.

    Raises:
        TypeError: If ``problem`` is no ``UnrolledProblem``.
        ValueError: If the horizon is sampled.
    """
    check_problem(problem)
    if callable(problem.horizon):
        raise ValueError(
            f"{needed_by} needs a static horizon; got problem.horizon={problem.horizon!r}, a "
            "sampler. Set a whole number with problem._replace(horizon=...), or use an estimator "
            "with a `truncation`, such as pes or tbptt."
        )
    return positive_int("problem.horizon", problem.horizon)


def check_truncation(problem: UnrolledProblem, truncation: int) -> int:
    """Returns the truncation as an int, having checked it against the horizon.

    Raises:
        ValueError: If it does not divide a static horizon, or if ``evaluate`` meets a sampled one.
    """
    check_problem(problem)
    truncation = positive_int("truncation", truncation)
    if callable(problem.horizon):
        if problem.evaluate is not None:
            raise ValueError(
                "problem.evaluate needs a static horizon, since a window counts T/K times; got "
                f"problem.horizon={problem.horizon!r}, a sampler. Set a whole number, or drop the "
                "evaluation with problem._replace(evaluate=None)."
            )
        return truncation
    horizon = positive_int("problem.horizon", problem.horizon)
    if horizon % truncation:
        raise ValueError(
            f"`truncation` must divide `problem.horizon`; got truncation={truncation} and "
            f"problem.horizon={horizon}. Use one of {divisors(horizon)}."
        )
    return truncation


def divisors(number: int) -> str:
    """The divisors of a number, as a list to choose from."""
    return _shorten([d for d in range(1, number + 1) if number % d == 0])


def _shorten(numbers: list[int], most: int = 24) -> str:
    if len(numbers) <= most:
        return ", ".join(map(str, numbers))
    half = most // 2
    return ", ".join([*map(str, numbers[:half]), "...", *map(str, numbers[-half:])])


def check_remat(remat: Any) -> None:
    """Raises ValueError unless ``remat`` is None, "step", "sqrt" or a positive number."""
    whole = isinstance(remat, int | np.integer) and not isinstance(remat, bool) and remat >= 1
    if remat is not None and not whole and (not isinstance(remat, str) or remat not in REMAT):
        raise ValueError(
            '`remat` must be None, "step", "sqrt" or how many states to keep, at least 1; got '
            f"{remat!r}."
        )


REMAT = ("step", "sqrt")


def check_sigma(sigma: Any) -> None:
    """Raises ValueError or TypeError if a known value in ``sigma`` is no positive number."""
    leaves = jax.tree_util.tree_leaves_with_path(sigma)
    if not leaves:
        raise ValueError(f"`sigma` has no leaves; got {sigma!r}. Pass a float such as 0.1.")
    for path, leaf in leaves:
        if isinstance(leaf, jax.core.Tracer):
            continue
        where = f"sigma{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(dtype_of(leaf), np.number) or np.iscomplexobj(leaf):
            raise TypeError(f"`sigma` must be real numbers; got {where}={describe(leaf)}.")
        value = np.asarray(leaf, dtype=np.float64)
        if not (np.all(np.isfinite(value)) and np.all(value > 0)):
            raise ValueError(
                f"`sigma` must be positive and finite; got {where}={leaf}. It is the standard "
                "deviation of the perturbation in theta's units."
            )


def broadcast_sigma(sigma: Any, theta: Theta) -> Any:
    """Returns ``sigma`` as a tree with theta's structure.

    Raises:
        ValueError: If ``sigma`` is no pytree prefix of theta, or a leaf does not broadcast.
    """
    try:
        full = jax.tree.broadcast(sigma, theta)
    except ValueError as error:
        raise ValueError(
            "`sigma` must be a number or a pytree prefix of theta; got structure "
            f"{jax.tree.structure(sigma)} for theta of structure {jax.tree.structure(theta)}."
        ) from error

    def check(path, s, x):
        shape = np.shape(s)
        aligned = zip(shape[::-1], x.shape[::-1], strict=False)
        if len(shape) > x.ndim or not all(a in (1, b) for a, b in aligned):
            raise ValueError(
                f"sigma{jax.tree_util.keystr(path)} has shape {shape}, which does not "
                f"broadcast to theta's {describe(x)} there. Use a scalar or the leaf's shape."
            )

    jax.tree_util.tree_map_with_path(check, full, theta)
    return full


def check_data(data: Any, size: int, axis: str, what: str = "inner step") -> None:
    """Raises ValueError if a leaf of ``data`` has not ``size`` as its leading axis."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != size:
            raise ValueError(
                f"data{jax.tree_util.keystr(path)} is {describe(leaf)}; its leading axis must be "
                f"{axis}={size}, one slice per {what}. Reshape or stack the batches."
            )


def check_step(
    problem: UnrolledProblem, key: Key, theta: Theta, data: Any = None
) -> tuple[Any, int]:
    """Traces one inner step abstractly and checks what it returns.

    Returns:
        The trace, from (key, theta, t, data) to (state before, state after, losses); and the number
        of leaves in the state.

    Raises:
        TypeError: If ``step`` does not return (state, loss), or changes the state's structure,
            shapes or dtypes; the message lists the differing paths.
        ValueError: If the loss is not a scalar.
    """

    def first_step(key, theta, t, data):
        # The barrier gives each leaf of the state a name of its own in the trace, constants too.
        state = jax.lax.optimization_barrier(strong_state(problem.init(key, theta), "init"))
        extra = () if data is None else (jax.tree.map(lambda x: jnp.asarray(x)[0], data),)
        _check_takes(problem.step, key, theta, state, 0, *extra)
        return state, problem.step(key, theta, state, t, *extra)

    def checked(key, theta, t, data):
        before, result = first_step(key, theta, t, data)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"`step` must return (state, loss); got {type(result).__name__} "
                f"{jax.tree.structure(result)}."
            )
        after, loss = result
        after = strong_state(after, "step")
        _check_same(before, after)
        check_loss("step", loss)
        losses = [loss]
        if problem.evaluate is not None:
            losses.append(problem.evaluate(key, theta, before))
            check_loss("evaluate", losses[-1])
        return before, after, losses

    trace, (before, *_) = jax.make_jaxpr(checked, return_shape=True)(key, theta, jnp.int32(0), data)
    return trace, len(jax.tree.leaves(before))


def _check_takes(step: Any, *arguments: Any) -> None:
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):
        return  # nothing can be known of it
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = "key, theta, state, t" + (", batch" if len(arguments) == 5 else "")
        raise TypeError(
            f"`step{signature}` cannot be called as step({given}): {error}. The fifth argument is "
            "the slice of `estimate(..., data=)`, there only when data is streamed (and not in "
            '`init`, where average(stagger="burn_in") runs the workers).'
        ) from error


def check_worker_state(state: Any, like: Any) -> None:
    """Raises TypeError if a worker's state is not like ``like``: maker, structure, shapes."""
    held = getattr(getattr(state, "episode", None), "key", like.episode.key)
    if held.dtype != like.episode.key.dtype:
        raise TypeError(
            f"`key` is of dtype {like.episode.key.dtype} but the worker state holds {held.dtype}; "
            "use one PRNG implementation throughout."
        )
    # Only `episode` is required of a state; who made it is said by those that carry `made_by`.
    theirs, ours = (getattr(s, "made_by", None) for s in (state, like))
    named = ours is not None and hasattr(like, "_replace")
    differences = _differences(like._replace(made_by=theirs) if named else like, state)
    if differences or theirs != ours:
        origin = f"was made by {theirs}" if theirs else f"is a {type(state).__name__}"
        details = f" Expected -> got:\n{differences}\n" if differences else " "
        raise TypeError(
            f"`state` is not this estimator's for this theta: it {origin}; this is "
            f"{ours or f'a {type(like).__name__}'}."
            f"{details}Make it with `estimator.init(key, theta)` of the same estimator."
        )


def check_loss(made_by: str, loss: Any) -> None:
    """Raises ValueError if ``loss`` is not a real scalar."""
    if isinstance(loss, tuple | list | dict):
        raise ValueError(
            f"the loss of `{made_by}` must be a scalar; got a {type(loss).__name__}. Return the "
            "loss alone, without what comes beside it."
        )
    if np.shape(loss) != ():
        raise ValueError(
            f"the loss of `{made_by}` must be a scalar; got shape {np.shape(loss)}. Take its mean."
        )
    if not jnp.issubdtype(dtype_of(loss), np.number) and dtype_of(loss) != np.bool_:
        raise ValueError(f"the loss of `{made_by}` must be a number; got {describe(loss)}.")
    if jnp.issubdtype(dtype_of(loss), jnp.complexfloating):
        raise ValueError(f"the loss of `{made_by}` must be real; got {describe(loss)}.")


def _check_same(before: State, after: State) -> None:
    differences = _differences(before, after)
    if differences:
        raise TypeError(
            "`step` must return a state with the structure, shapes and dtypes that it was given "
            f"(those of `init`); it changed:\n{differences}\nCast or reshape in `step`, or begin "
            "with the final form in `init`."
        )


def leaf_differences(old: Any, new: Any, name: str = "state") -> list[str]:
    """The leaves in which two trees differ, a line each."""

    def leaves(tree):
        named = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): describe(x) for path, x in named}

    a, b = leaves(old), leaves(new)
    return [
        f"  {name}{path}: {a.get(path, 'absent')} -> {b.get(path, 'absent')}"
        for path in [*a, *(path for path in b if path not in a)]
        if a.get(path) != b.get(path)
    ]


def _differences(old: Any, new: Any) -> str:
    """The leaves in which two states differ, or else their structures; empty where they do not."""
    lines = leaf_differences(old, new)
    if not lines and jax.tree.structure(old) != jax.tree.structure(new):
        lines = [f"  {jax.tree.structure(old)} -> {jax.tree.structure(new)}"]
    return "\n".join(lines)

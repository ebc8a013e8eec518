"""Inner optimizers: one update in the dtypes that it began with, and what is unsafe about some.

Most optax optimizers are written to be run, not to be differentiated. Where a square root is taken
of exactly zero its slope is infinite, and backpropagation may make NaN of it: optax.adam with
``eps_root=0`` at a coordinate without gradient (a dead ReLU, one at its optimum). optax.radam gives
NaN from its third update on. Nothing shows before the gradient is NaN. So when a step is about to
be differentiated, the optimizer is tried on made-up gradients, and what was seen is said. Evolution
strategies only run it forwards, and are not warned.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from unrollgrad._checks import arguments
from unrollgrad.types import Theta

Optimizer = Callable[[Theta, Any], optax.GradientTransformation]

_STEPS = 6  # radam's trouble begins with the third
_LONGEST = 8  # axis of a leaf that the optimizer is tried on
_MOST_NUMBERS = 100_000  # in theta and weights that it is tried on as they are
_SINGULAR = {"sqrt", "rsqrt", "cbrt", "pow", "log", "log1p", "acos", "asin", "acosh", "atanh"}
_SINGULAR |= {"cholesky", "eigh", "qr", "svd"}


def init(optimizer: Optimizer, theta: Theta, params: Any) -> Any:
    """The optimizer's state for fresh weights.

    Raises:
        TypeError: If it needs a number and has an array.
        ValueError: If hyperparameters are kept in 16 bits.
    """
    with _arrays_for_numbers():
        state = optimizer(theta, jnp.int32(0)).init(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        injected = jax.tree_util.GetAttrKey("hyperparams") in path
        if injected and arguments.dtype_of(leaf) in (jnp.bfloat16, jnp.float16):
            name = getattr(path[-1], "key", path[-1])
            raise ValueError(
                f"the inner optimizer keeps its hyperparameter {name!r} in {leaf.dtype} (opt_state"
                f"{jax.tree_util.keystr(path)}), the dtype of the weights: 0.999 is 1.0 in "
                "bfloat16, and Adam's bias correction divides by zero. Pass "
                "optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)."
            )
    return state


def update(
    optimizer: Optimizer, theta: Theta, t: Any, grad: Any, state: Any, params: Any, /, **extra: Any
) -> tuple[Any, Any]:
    """The updates, and the next state with the dtypes of the old one.

    Numbers that ``optax.inject_hyperparams`` keeps in the state are those of this theta and t, not
    of the theta that the episode began with, as optax alone would have it.

    Raises:
        TypeError: If the optimizer needs a number and has an array.
    """
    with _arrays_for_numbers():
        transform = optax.with_extra_args_support(optimizer(theta, t))
        if any(map(_is_injected, jax.tree.leaves(state, is_leaf=_is_injected))):
            state = _renewed(state, transform.init(params))
        updates, new = transform.update(grad, state, params, **{"grad": grad, **extra})
    return updates, _keep_dtypes(state, new)


def _is_injected(x: Any) -> bool:
    return isinstance(x, optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState)


def _renewed(state: Any, fresh: Any) -> Any:
    """The state with the injected hyperparameters of a fresh one, in its own dtypes."""
    if jax.tree.structure(state) != jax.tree.structure(fresh):
        return state  # refused by name, in ``problem_checks.check_step``

    def number(old, new):
        return jnp.asarray(new, arguments.dtype_of(old))

    def node(old, new):
        if not _is_injected(old):
            return old
        hyperparams = jax.tree.map(number, old.hyperparams, new.hyperparams)
        inner = _renewed(old.inner_state, new.inner_state)
        return old._replace(hyperparams=hyperparams, inner_state=inner)

    return jax.tree.map(node, state, fresh, is_leaf=_is_injected)


def _keep_dtypes(old: Any, new: Any) -> Any:
    """Rounds to the dtypes the optimizer began with: a float32 theta would widen bfloat16 state."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new  # refused by name, in ``problem_checks.check_step``

    def leaf(old, new):
        floating = jnp.issubdtype(arguments.dtype_of(old), jnp.floating)
        return jnp.asarray(new, arguments.dtype_of(old)) if floating else new

    return jax.tree.map(leaf, old, new)


@contextlib.contextmanager
def _arrays_for_numbers() -> Iterator[None]:
    try:
        yield
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        raise TypeError(
            "the inner optimizer needs a Python number where it has an array: "
            f"{str(error).splitlines()[0]} optax.inject_hyperparams makes arrays of whole numbers "
            "and flags too: name them in its `static_args`. Or do without it: `optimizer(theta, t)`"
            " is called in every step, so plain optax takes its hyperparameters from theta."
        ) from error


class Shapes(NamedTuple):
    """The structure, shapes and dtypes of a tree; it can be hashed."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    def filled(self, make: Callable[[tuple[int, ...], int], np.ndarray]) -> Any:
        """The tree with ``make(shape, index)`` as its leaves."""
        leaves = [make(shape, i).astype(dtype) for i, (shape, dtype) in enumerate(self.leaves)]
        return self.structure.unflatten(leaves)


def shapes(tree: Any) -> Shapes:
    """Those of a tree of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return Shapes(structure, tuple((np.shape(x), np.dtype(arguments.dtype_of(x))) for x in leaves))


def when_differentiated(updates: Any, report: Callable[[], None]) -> Any:
    """The updates; calls ``report`` when their derivative is traced, in any mode."""

    @jax.custom_jvp
    def same(x):
        return x

    @same.defjvp
    def rule(primals, tangents):
        report()
        return primals[0], tangents[0]

    def leaf(x):
        return same(x) if jnp.issubdtype(arguments.dtype_of(x), jnp.floating) else x

    return jax.tree.map(leaf, updates)


def warn_of_derivatives(optimizer: Optimizer, theta: Shapes, params: Shapes) -> None:
    """Warns if derivatives of the optimizer's update are not finite where the update is."""
    seen = _tried(optimizer, theta, params, differentiate=True)
    if seen is None:
        return
    (plain, at_zeros) = (_first_bad(*here) for here in zip(*seen, strict=True))
    if plain is not None:
        if any(dtype == np.float16 for _, dtype in params.leaves):
            advice = "The weights are float16, whose range is too small for them: use float32"
        else:
            advice = (
                "optax.radam is one that does this, both branches of its `where` being "
                "differentiated, and no setting of it cures that: use optax.adam or optax.nadam "
                "with `eps_root`, such as optax.adam(learning_rate, eps_root=1e-8)"
            )
        warnings.warn(
            "the inner optimizer has derivatives that are not finite, on plain gradients, at its "
            f"update {plain + 1}: backpropagation through it gives NaN from there on. {advice}, or "
            "an estimator that only runs it forwards, such as pes.",
            stacklevel=2,
        )
    elif at_zeros is not None:
        warnings.warn(
            "the inner optimizer has derivatives that are not finite where an inner gradient is "
            "exactly zero (a dead ReLU, a coordinate at its optimum), where backpropagation may "
            "give NaN. Set `eps_root` where it has one, such as optax.adam(learning_rate, "
            "eps_root=1e-8): a coordinate that sits at its optimum still gets derivatives of order "
            "learning_rate / sqrt(eps_root) per step. Where it has none (optax.adafactor, "
            "optax.contrib.prodigy), use an optimizer that has, or an estimator that only runs it "
            "forwards, such as pes.",
            stacklevel=2,
        )


def warn_of_float16(optimizer: Optimizer, theta: Shapes, params: Shapes) -> None:
    """Warns if an update of float16 weights is not finite where a gradient is zero."""
    if all(dtype != np.float16 for _, dtype in params.leaves):
        return
    seen = _tried(optimizer, theta, params, differentiate=False)
    if seen is not None and seen[0][0].all() and not seen[0][1].all():
        warnings.warn(
            "the inner optimizer's update is not finite where a gradient is exactly zero: the "
            "weights are float16, in which its eps is rounded to zero, and 0 / 0 is left. Set a "
            "larger one, such as optax.adam(learning_rate, eps=1e-4), or hold the weights in "
            "float32.",
            stacklevel=2,
        )


def _first_bad(values: np.ndarray, derivatives: np.ndarray) -> int | None:
    """The first step whose derivatives are not finite, if all updates until then are."""
    if derivatives.all():
        return None
    first = int(np.argmin(derivatives))
    return first if values[: first + 1].all() else None


def _tried(
    optimizer: Optimizer, theta: Shapes, params: Shapes, *, differentiate: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Which updates, and which derivatives of updates, of made-up gradients are finite.

    Returns:
        Two arrays (2, steps): gradients without zeros, and zero in every other coordinate. None
        where nothing can be said: the trial is ours, not the user's,
        so an optimizer that it does not suit (a line search, one that holds traced values) is let
        pass in silence.
    """
    # Two leaves compile fastest. What they are blamed for must be seen on the real structure too:
    # an optimizer may treat vectors and matrices in different ways, or refuse those of others.
    dtypes = list(dict.fromkeys(dtype for _, dtype in params.leaves))
    few = shapes([(np.ones((4, 4), dtype), np.ones(4, dtype)) for dtype in dtypes])
    small = sum(math.prod(s) for s, _ in theta.leaves + params.leaves) <= _MOST_NUMBERS
    whole = (theta, params) if small else (_clipped(theta), _clipped(params))
    seen = None
    for theta_like, like in dict.fromkeys([(theta, few), (theta, _clipped(params)), whole]):
        here = _tried_on(optimizer, theta_like, like, differentiate=differentiate)
        if here is not None:
            confirmed, seen = seen is not None, here
            if confirmed or (seen[0].all() and seen[1].all()):
                return seen
    return seen


def _clipped(like: Shapes) -> Shapes:
    leaves = [(tuple(min(d, _LONGEST) for d in shape), dtype) for shape, dtype in like.leaves]
    return like._replace(leaves=tuple(leaves))


def _tried_on(
    optimizer: Optimizer, theta: Shapes, params: Shapes, *, differentiate: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """What is finite with theta and weights of these shapes; None where it cannot be run."""
    with (
        contextlib.suppress(Exception),
        warnings.catch_warnings(),
        jax.ensure_compile_time_eval(),
        jax.debug_nans(False),
        jax.default_device(_cpu()),
    ):
        warnings.simplefilter("ignore")
        arguments = _made_up(theta, params)
        forwards = functools.partial(_trial, optimizer, differentiate=False)
        names = _primitives(jax.make_jaxpr(forwards)(*arguments)) if differentiate else set()
        if differentiate and ("while" in names or _SINGULAR.isdisjoint(names)):
            # Compiling the trial would take longer than all else that is done here.
            return np.ones((2, _STEPS), bool), np.ones((2, _STEPS), bool)
        trial = functools.partial(_trial, optimizer, differentiate=differentiate)
        values, derivatives = jax.jit(trial)(*arguments)
        return np.asarray(values), np.asarray(derivatives)
    return None


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None  # the default device


def _made_up(theta: Shapes, params: Shapes) -> tuple[Any, Any, Any]:
    """Theta, weights, and gradients with leading axes (2, steps)."""

    def draw(shape, index):
        draws = np.random.default_rng(index).normal(size=(2, _STEPS, *shape))
        draws[1].reshape(_STEPS, -1)[:, ::2] = 0
        return draws

    middle = theta.filled(lambda shape, _: np.full(shape, 0.5))  # fits rates and their logarithms
    return middle, params.filled(lambda shape, _: np.ones(shape)), params.filled(draw)


def _trial(
    optimizer: Optimizer, theta: Theta, params: Any, gradients: Any, *, differentiate: bool
) -> tuple[jax.Array, jax.Array]:
    """Updates with the gradients: where their values are finite, and where their derivatives."""

    def step(carry, inputs):
        (state, params), (t, grad) = carry, inputs
        floats, rest = _split(state)

        def run(grad, floats, params):
            extra = {"value": jnp.float32(1.0), "value_fn": lambda params: jnp.float32(1.0)}
            state = _joined(floats, rest)
            updates, new = update(optimizer, theta, t, grad, state, params, **extra)
            floats, others = _split(jax.tree.map(arguments.strong, new))
            return (updates, floats), others

        if differentiate:
            out, pull, rest = jax.vjp(run, grad, floats, params, has_aux=True)
            of_grad, *of_begin = pull(jax.tree.map(jnp.ones_like, out))
            # Fresh weights and state are no function of theta: nothing is pulled back further.
            derivatives = _finite(of_grad) & ((t == 0) | _finite(of_begin))
        else:
            out, rest = run(grad, floats, params)
            derivatives = _finite(out)
        carry = _joined(out[1], rest), optax.apply_updates(params, out[0])
        return carry, (_finite(out[0]), derivatives)

    def episode(gradients):
        state = jax.tree.map(arguments.strong, optimizer(theta, jnp.int32(0)).init(params))
        return jax.lax.scan(step, (state, params), (jnp.arange(_STEPS), gradients))[1]

    return jax.vmap(episode)(gradients)


def _primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives in a program, inner ones too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    return names.union(
        *(_primitives(j) for eqn in jaxpr.eqns for j in core.jaxprs_in_params(eqn.params))
    )


def _split(tree: Any) -> tuple[Any, Any]:
    """The floating leaves and the others, None in place of those that are elsewhere."""

    def is_floating(x):
        return jnp.issubdtype(arguments.dtype_of(x), jnp.floating)

    return (
        jax.tree.map(lambda x: x if is_floating(x) else None, tree),
        jax.tree.map(lambda x: None if is_floating(x) else x, tree),
    )


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )


def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))

"""One update of an inner optimizer in the dtypes of its state, and warnings about its derivatives.

Most optax optimizers are written to be run, not to be differentiated. The slope of a square root is
infinite at exactly zero, and backpropagation may make NaN of it: optax.adam with ``eps_root=0`` at
a coordinate with zero gradient (a dead ReLU, a coordinate at its optimum). optax.radam gives NaN
from its third update on. Nothing shows before the gradient is NaN. So the optimizer is tried on
made-up gradients when a step is about to be differentiated, and a warning says what was seen.
Evolution strategies only run the optimizer forwards, and give no warning.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import float_leaves
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.types import ArrayTree, Numeric, Theta

Optimizer = Callable[..., optax.GradientTransformation]  # optimizer(theta, t)

_STEPS = 6  # radam's derivatives are NaN from the third on
_LONGEST = 8  # axes are cut to this length for a trial ...
_MOST_NUMBERS = 100_000  # ... if theta and weights have more numbers than this
_SINGULAR = {"sqrt", "rsqrt", "cbrt", "pow", "log", "log1p", "acos", "asin", "acosh", "atanh"}
_SINGULAR |= {"cholesky", "eigh", "qr", "svd"}


def init(optimizer: Optimizer, theta: Theta, params: optax.Params) -> optax.OptState:
    """The optimizer's state for fresh weights.

    Raises:
        TypeError: If the optimizer needs a Python number and gets an array.
        ValueError: If the state keeps hyperparameters in 16 bits.
    """
    with _arrays_for_numbers():
        transform = optimizer(theta, jnp.int32(0))
        state = transform.init(params)
        check_injected("the inner optimizer", transform.init, params, state)
    return state


def check_injected(
    name: str,
    init: Callable[[optax.Params], optax.OptState],
    params: optax.Params,
    state: optax.OptState,
) -> None:
    """Raises ValueError if ``optax.inject_hyperparams`` rounded a number to the weights' 16 bits.

    Where the numbers can be read, only one that became 1 is refused.
    """

    def injected(state):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {p: x for p, x in leaves if jax.tree_util.GetAttrKey("hyperparams") in p}

    low = (jnp.bfloat16, jnp.float16)
    narrow = {p: x for p, x in injected(state).items() if arguments.dtype_of(x) in low}
    if not narrow:
        return
    exact = injected(init(jax.tree.map(_widened, params)))
    for path, x in narrow.items():
        given = exact[path]
        if arguments.dtype_of(given) == x.dtype:
            continue  # an array of the user's own, such as a rate computed from a bfloat16 theta
        if isinstance(x, jax.core.Tracer) or (float(x) == 1 and float(given) != 1):
            raise ValueError(
                f"{name} keeps its hyperparameter {getattr(path[-1], 'key', path[-1])!r} in "
                f"{x.dtype} (opt_state{jax.tree_util.keystr(path)}), the dtype of the weights: "
                "0.999 is 1.0 in bfloat16, and Adam's bias correction divides by zero. Pass "
                "optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)."
            )


def _widened(x):
    return jnp.zeros(np.shape(x), wide(arguments.dtype_of(x))) if _is_floating(x) else x


def update(
    optimizer: Optimizer,
    theta: Theta,
    t: Numeric,
    grad: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    /,
    **extra: object,
) -> tuple[optax.Updates, optax.OptState]:
    """The updates, and the next state in the dtypes of the old one.

    The hyperparameters that ``optax.inject_hyperparams`` keeps in the state are computed from this
    theta and t; optax alone would use the theta with which the episode began.

    Raises:
        TypeError: If the optimizer needs a Python number and gets an array.
    """
    with _arrays_for_numbers(), standard_promotion():
        transform = optax.with_extra_args_support(optimizer(theta, t))
        if any(map(_is_injected, jax.tree.leaves(state, is_leaf=_is_injected))):
            state = _renewed(state, transform.init(params))
        updates, new = transform.update(grad, state, params, **{"grad": grad, **extra})
    return updates, keep_dtypes(state, new)


def _is_injected(x: object) -> bool:
    return isinstance(x, optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState)


def _renewed(state, fresh):
    """The state with the injected hyperparameters of a fresh one, in its own dtypes."""
    if jax.tree.structure(state) != jax.tree.structure(fresh):
        return state  # ``inner_loop.check_step`` refuses it by name

    def node(old, new):
        if not _is_injected(old):
            return old
        hyperparams = jax.tree.map(_cast, old.hyperparams, new.hyperparams)
        inner = _renewed(old.inner_state, new.inner_state)
        return old._replace(hyperparams=hyperparams, inner_state=inner)

    return jax.tree.map(node, state, fresh, is_leaf=_is_injected)


def keep_dtypes(old: optax.OptState, new: optax.OptState) -> optax.OptState:
    """Casts floating leaves to the old dtypes: a float32 theta would widen bfloat16 state."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new  # ``inner_loop.check_step`` refuses it by name
    return jax.tree.map(lambda x, y: _cast(x, y) if _is_floating(x) else y, old, new)


def _cast(old, new):
    return jnp.asarray(new, arguments.dtype_of(old))


def _is_floating(x: object) -> bool:
    return jnp.issubdtype(arguments.dtype_of(x), jnp.floating)


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
    """The structure, shapes and dtypes of a tree, as a hashable value."""

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    def filled(self, make: Callable[[tuple[int, ...], int], np.ndarray]) -> ArrayTree:
        """The tree with ``make(shape, index)`` as its leaves."""
        leaves = [make(x.shape, i).astype(x.dtype) for i, x in enumerate(self.leaves)]
        return self.structure.unflatten(leaves)

    def clipped(self) -> "Shapes":
        """Shapes with no axis above ``_LONGEST``."""
        leaves = [x.update(shape=tuple(min(d, _LONGEST) for d in x.shape)) for x in self.leaves]
        return self._replace(leaves=tuple(leaves))


def shapes(tree: object) -> Shapes:
    """The ``Shapes`` of a tree of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    dtypes = (arguments.dtype_of(x) for x in leaves)
    return Shapes(structure, tuple(map(jax.ShapeDtypeStruct, map(np.shape, leaves), dtypes)))


def when_differentiated(updates: optax.Updates, report: Callable[[], None]) -> optax.Updates:
    """The updates; calls ``report`` when their derivative is traced, in any mode."""
    same = jax.custom_jvp(lambda x: x)

    @same.defjvp
    def rule(primals, tangents):
        report()
        return primals[0], tangents[0]

    return jax.tree.map(lambda x: same(x) if _is_floating(x) else x, updates)


def warn_of_derivatives(optimizer: Optimizer, theta: Shapes, params: Shapes) -> None:
    """Warns if derivatives of the optimizer's update are not finite where the update is."""
    seen = _tried(optimizer, theta, params, differentiate=True)
    if seen is None:
        return
    plain, at_zeros = (_first_bad(*row) for row in zip(*seen, strict=True))
    if plain is not None:
        if any(x.dtype == np.float16 for x in params.leaves):
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
    if all(x.dtype != np.float16 for x in params.leaves):
        return
    seen = _tried(optimizer, theta, params, differentiate=False)
    if seen is not None and seen.values[0].all() and not seen.values[1].all():
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


class _Finite(NamedTuple):
    """Whether the updates from made-up gradients, and their derivatives, are finite.

    Both are bool (2, steps): gradients without zeros, and zero in every other coordinate.
    """

    values: np.ndarray
    derivatives: np.ndarray


def _tried(
    optimizer: Optimizer, theta: Shapes, params: Shapes, *, differentiate: bool
) -> _Finite | None:
    """The result of a trial; None if the optimizer cannot be tried.

    The trial is ours, not the user's, so an optimizer that it does not suit (a line search, one
    that holds traced values) passes in silence.
    """
    # Two leaves compile fastest. A fault that they show must appear on the real structure too: an
    # optimizer may treat vectors and matrices in different ways, or refuse another structure.
    dtypes = dict.fromkeys(x.dtype for x in params.leaves)
    few = shapes([(np.ones((4, 4), dtype), np.ones(4, dtype)) for dtype in dtypes])
    small = sum(math.prod(x.shape) for x in theta.leaves + params.leaves) <= _MOST_NUMBERS
    whole = (theta, params) if small else (theta.clipped(), params.clipped())
    trials = dict.fromkeys([(theta, few), (theta, params.clipped()), whole])
    each = (_tried_on(optimizer, *on, differentiate=differentiate) for on in trials)
    ran = (seen for seen in each if seen is not None)
    first = next(ran, None)
    return first if first is None or np.all(first) else next(ran, first)


def _tried_on(
    optimizer: Optimizer, theta: Shapes, params: Shapes, *, differentiate: bool
) -> _Finite | None:
    """The trial with theta and weights of these shapes; None if it fails."""
    with (
        contextlib.suppress(Exception),
        warnings.catch_warnings(),
        jax.ensure_compile_time_eval(),
        jax.debug_nans(False),
        jax.default_device(_cpu()),
    ):
        warnings.simplefilter("ignore")
        inputs = _made_up(theta, params)
        trial = functools.partial(_trial, optimizer, differentiate=differentiate)
        if differentiate:
            forwards = functools.partial(_trial, optimizer, differentiate=False)
            names = _primitives(jax.make_jaxpr(forwards)(*inputs))
            if "while" in names or _SINGULAR.isdisjoint(names):
                # Compiling the trial would take longer than everything else here.
                return _Finite(*np.ones((2, 2, _STEPS), bool))
        return _Finite(*map(np.asarray, jax.jit(trial)(*inputs)))
    return None


def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None  # the default device


def _made_up(theta: Shapes, params: Shapes) -> tuple[ArrayTree, ...]:
    """Theta, weights, and gradients with leading axes (2, steps)."""

    def draw(shape, index):
        draws = np.random.default_rng(index).normal(size=(2, _STEPS, *shape))
        draws[1].reshape(_STEPS, -1)[:, ::2] = 0
        return draws

    middle = theta.filled(lambda shape, _: np.full(shape, 0.5))  # fits rates and their logarithms
    return middle, params.filled(lambda shape, _: np.ones(shape)), params.filled(draw)


def _trial(optimizer, theta, params, gradients, *, differentiate):
    """Updates with the gradients: whether they are finite, and whether their derivatives are."""

    def step(carry, inputs):
        (state, params), (t, grad) = carry, inputs
        floats, rebuild = float_leaves.split(state)

        def run(grad, floats, params):
            extra = {"value": jnp.float32(1.0), "value_fn": lambda params: jnp.float32(1.0)}
            updates, new = update(optimizer, theta, t, grad, rebuild(floats), params, **extra)
            new = jax.tree.map(arguments.strong, new)
            return (updates, float_leaves.floats_of(new)), new

        if differentiate:
            out, pull, new = jax.vjp(run, grad, floats, params, has_aux=True)
            of_grad, *of_begin = pull(jax.tree.map(jnp.ones_like, out))
            # Fresh weights and state do not depend on theta: nothing is pulled back further.
            derivatives = _finite(of_grad) & ((t == 0) | _finite(of_begin))
        else:
            out, new = run(grad, floats, params)
            derivatives = _finite(out)
        return (new, optax.apply_updates(params, out[0])), (_finite(out[0]), derivatives)

    def episode(gradients):
        state = jax.tree.map(arguments.strong, optimizer(theta, jnp.int32(0)).init(params))
        return jax.lax.scan(step, (state, params), (jnp.arange(_STEPS), gradients))[1]

    return jax.vmap(episode)(gradients)


def _primitives(program) -> set[str]:
    """The names of all primitives in a program and in the programs inside it."""
    eqns = getattr(program, "jaxpr", program).eqns
    from jax.extend import core  # takes long to import

    inside = (_primitives(j) for eqn in eqns for j in core.jaxprs_in_params(eqn.params))
    return {eqn.primitive.name for eqn in eqns}.union(*inside)


def _finite(tree: object) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))

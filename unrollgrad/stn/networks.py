"""Self-tuning networks: the original, and the centred and linearised one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unrollgrad._core.descriptions import described, explained_by
from unrollgrad.stn import _steps
from unrollgrad.stn._steps import Draw, Method, SelfTuning, Settings
from unrollgrad.stn.losses import moved_loss, on_shared, plus, shared_loss
from unrollgrad.stn.response import Response, scaled_rows
from unrollgrad.types import ArrayTree, GradientEstimator, Key, Numeric, Sigma, Theta

__all__ = ["SelfTuning", "delta_stn", "stn"]


@described
def delta_stn(
    *,
    loss: Callable[..., Numeric],
    meta_loss: Callable[..., Numeric],
    init_params: Callable[[Key], ArrayTree],
    sample_batch: Callable[[Key], Any],
    inner_optimizer: optax.GradientTransformation,
    response_optimizer: optax.GradientTransformation | None = None,
    response: Response | None = None,
    sigma: Sigma = 1.0,
    tune_sigma: bool = True,
    sigma_optimizer: optax.GradientTransformation | None = None,
    entropy: Numeric = 1e-3,
    train_steps: int = 5,
    num_perturbations: int = 1,
    warm_up: int = 0,
) -> GradientEstimator:
    """Delta-STN: hyperparameters tuned in one training run, by a centred, linear best response.

    Beside the weights w, a response R is learned: how the best weights move if the hyperparameters
    theta do. One call takes ``train_steps`` training steps, each on one batch,

        w  along  d/dw loss(theta, w),
        R  along  d/dR loss(theta + e, f(w) + df/dw [R(e)]),   e ~ N(0, sigma^2),

    and then estimates, at w* (theta') = w + R(theta' - theta),

        grad = d/dtheta' meta_loss(theta', w*(theta')) at theta' = theta.

    f are the network's outputs, if ``loss`` is a ``stn.SplitLoss``; a plain function of the weights
    is not linearised: then f(w) = w. ``ug.fit(delta_stn(...), theta, optax.rmsprop(0.01), ...)`` is
    the algorithm: ``num_steps`` calls, one step of theta each.

    Where the training loss is quadratic in w and bilinear in (w, theta), the response that training
    tends to is exactly dw*/dtheta = -H^-1 B, with H = d2 loss / dw^2 and B = d2 loss / dtheta dw,
    for every sigma, and ``grad`` is ``implicit.hypergradient``. Otherwise it is a mean over the
    perturbations, biased by O(sigma^2), by the lag of w and R, and by what the law of the response
    cannot express. ``meta_loss`` may depend on theta itself, too; in the papers it does not
    (dropout and regularisation are off), and all of ``grad`` comes through the response.

    **Sigma.** It must be small enough for a linear response and large enough to be seen. If tuned,
    ``grad`` is taken at theta + e, and sigma descends E meta_loss(theta + e, w*(theta + e)) -
    entropy sum log sigma.

    **What cannot be tuned:** the optimizer's own settings, on which best weights do not depend.
    Hyperparameters that are whole numbers are floored inside ``loss`` (``jnp.floor``): the response
    still learns from the perturbed ones how the weights follow.

    Time of a training step: a gradient of ``loss``, and one more with respect to the response; with
    a ``SplitLoss`` the second one computes outputs, a ``jvp`` and its transpose, 5/3 of a gradient.
    Memory: the response (``scaled_rows``: another network) and its optimizer. Several perturbations
    share the weights with ``scaled_rows`` and quax; else each has a copy while a gradient is
    computed.

    Args:
        loss: ``loss(theta, params, batch, key) -> scalar``, the training loss, the mean over the
            batch; theta is unconstrained (``ug.constraints``). A ``stn.SplitLoss`` is linearised.
        meta_loss: ``meta_loss(theta, params, key) -> scalar``, the validation loss.
        init_params: ``init_params(key) -> params``, any pytree of floating arrays.
        sample_batch: ``sample_batch(key) -> batch``, from data on the device.
        inner_optimizer: The optax optimizer of params.
        response_optimizer: The response's optimizer; by default the same. The response's gradient
            is of the order of sigma^2: with a small sigma prefer one that scales, such as Adam.
        response: ``stn.scaled_rows()`` (the default), ``stn.linear()``, or a ``stn.Response``.
        sigma: Standard deviations of the perturbations in theta's units: a number, or a pytree
            prefix of theta; the first ones, if they are tuned.
        tune_sigma: Whether sigma is tuned.
        sigma_optimizer: sigma's optimizer, which moves its inverse softplus; by default
            ``optax.adam(0.01)``.
        entropy: The weight of sigma's entropy in its objective, in units of ``meta_loss``.
        train_steps: Training steps per call.
        num_perturbations: Draws of e in a training step; the rows of the batch are dealt out to
            them in groups. As many as rows: each example has its own.
        warm_up: The first calls, in which ``grad`` is zero and sigma stays.

    Returns:
        An estimator without episodes: it begins in ``init``. ``state.carried.params`` are the
        weights, ``state.carried.response`` the response's. ``estimate.loss`` is ``meta_loss``;
        ``info`` is a ``StnInfo``, of which ``stn.schedule`` makes the schedule of values.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a loss is not a scalar, a number is out of range, or ``num_perturbations``
            does not divide the batch.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> network = ug.stn.delta_stn(
        ...     loss=lambda theta, w, batch, key: (w - 1) ** 2 + (w - theta) ** 2,
        ...     meta_loss=lambda theta, w, key: (w - 3) ** 2, init_params=lambda key: jnp.zeros(()),
        ...     sample_batch=lambda key: None, inner_optimizer=optax.sgd(0.1), tune_sigma=False)
        >>> run = ug.fit(network, 0.0, optax.sgd(0.1), num_steps=300, key=jax.random.key(0))
        >>> print(f"{run.theta:.3f} {run.worker_state.carried.params:.3f}")
        5.000 3.000

    References:
        Bae and Grosse, Delta-STN: Efficient bilevel optimization for neural networks using
        structured response Jacobians, NeurIPS 2020, arXiv:2010.13514.
    """
    given = {k: v for k, v in locals().items() if k != "tune_sigma"}
    return _steps.self_tuning(_settings(given, tune_sigma), _DELTA)


@described
@explained_by(delta_stn)
def stn(
    *,
    loss: Callable[..., Numeric],
    meta_loss: Callable[..., Numeric],
    init_params: Callable[[Key], ArrayTree],
    sample_batch: Callable[[Key], Any],
    inner_optimizer: optax.GradientTransformation,
    response_optimizer: optax.GradientTransformation | None = None,
    response: Response | None = None,
    sigma: Sigma = 1.0,
    tune_sigma: bool = True,
    sigma_optimizer: optax.GradientTransformation | None = None,
    entropy: Numeric = 1e-3,
    train_steps: int = 5,
    num_perturbations: int = 1,
    warm_up: int = 0,
) -> GradientEstimator:
    """STN, the original self-tuning network: one network of weights and response together.

    The weights at theta are w + R(theta), with w and R trained together at perturbed
    hyperparameters. One call takes ``train_steps`` training steps, each on one batch,

        w, R  along  the gradient of  loss(theta + e, w + R(theta + e)),   e ~ N(0, sigma^2),

    and then estimates grad = d/dtheta meta_loss(theta, w + R(theta)), at theta + e if sigma is
    tuned. On a training loss that is quadratic in the weights and bilinear in (weights, theta), R
    tends to the exact best response's Jacobian, as with ``delta_stn``; theta far from 0 in units of
    sigma makes this slow, since w and R are then hard to tell apart. ``delta_stn`` has neither this
    fault nor weights that are trained at perturbed hyperparameters only.

    Time of a training step: one gradient of ``loss``, with respect to both. Memory: as
    ``delta_stn``.

    Args:
        loss: As in ``delta_stn``; it is never linearised.
        meta_loss: As in ``delta_stn``.
        init_params: As in ``delta_stn``.
        sample_batch: As in ``delta_stn``.
        inner_optimizer: As in ``delta_stn``.
        response_optimizer: As in ``delta_stn``.
        response: As in ``delta_stn``; the paper's is ``stn.scaled_rows(initial_std=0.01)``.
        sigma: As in ``delta_stn``.
        tune_sigma: As in ``delta_stn``.
        sigma_optimizer: As in ``delta_stn``.
        entropy: As in ``delta_stn``.
        train_steps: As in ``delta_stn``; 2 in the paper.
        num_perturbations: As in ``delta_stn``.
        warm_up: As in ``delta_stn``.

    Returns:
        An estimator, as ``delta_stn`` does; ``state.carried.params`` is w.

    Raises:
        TypeError, ValueError: As ``delta_stn`` does.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> network = ug.stn.stn(
        ...     loss=lambda theta, w, batch, key: (w - 1) ** 2 + (w - theta) ** 2,
        ...     meta_loss=lambda theta, w, key: (w - 2) ** 2, init_params=lambda key: jnp.zeros(()),
        ...     sample_batch=lambda key: None, inner_optimizer=optax.sgd(0.01), tune_sigma=False)
        >>> run = ug.fit(network, 0.0, optax.sgd(0.1), num_steps=2000, key=jax.random.key(0))
        >>> print(f"{run.theta:.2f}")
        3.00

    References:
        MacKay, Vicol, Lorraine, Duvenaud and Grosse, Self-tuning networks: bilevel optimization of
        hyperparameters using structured best-response functions, ICLR 2019, arXiv:1903.03088.
    """
    given = {k: v for k, v in locals().items() if k != "tune_sigma"}
    return _steps.self_tuning(_settings(given, tune_sigma), _STN)


def _settings(given: dict[str, Any], tune_sigma: bool) -> Settings:
    chosen = Settings(**given)
    if chosen.response is None:
        chosen = chosen._replace(response=scaled_rows())
    if not tune_sigma and chosen.sigma_optimizer is not None:
        raise ValueError(
            "`sigma_optimizer` moves nothing with tune_sigma=False; leave it out, or tune sigma."
        )
    if tune_sigma and chosen.sigma_optimizer is None:
        chosen = chosen._replace(sigma_optimizer=optax.adam(0.01))
    return chosen


def _of_delta(chosen: Settings, theta: Theta, carried: SelfTuning, draw: Draw):
    """The weights see theta itself, the response perturbed hyperparameters and linear outputs."""
    sigma = _steps.sigma_of(chosen, theta, carried.scales)

    def general(params):
        return _steps.as_loss(chosen.loss(theta, params, draw.batch, draw.key))

    def responding(response):
        def group(unit, rows, key):
            there = _steps.perturbed(theta, sigma, unit)
            offset = _difference(_steps.widened(there), _steps.widened(theta))
            if _steps.shares_weights(chosen):
                moved = _steps.moved(chosen, response, offset, carried.params)
                return _steps.as_loss(shared_loss(chosen.loss, there, moved, rows, key))
            move = _steps.move(chosen, response, offset, carried.params)
            return _steps.as_loss(moved_loss(chosen.loss, there, (carried.params, move), rows, key))

        return _steps.over_groups(chosen, group, draw)

    loss, grad = jax.value_and_grad(general)(carried.params)
    perturbed_loss, of_response = jax.value_and_grad(responding)(carried.response)
    return grad, of_response, (loss, perturbed_loss)


def _of_stn(chosen: Settings, theta: Theta, carried: SelfTuning, draw: Draw):
    """Weights and response see perturbed hyperparameters."""
    sigma = _steps.sigma_of(chosen, theta, carried.scales)

    def both(params, response):
        def group(unit, rows, key):
            there = _steps.perturbed(theta, sigma, unit)
            offset = _steps.widened(there)
            if _steps.shares_weights(chosen):
                moved = _steps.moved(chosen, response, offset, params)(1.0, False)
                loss = on_shared(lambda p: chosen.loss(there, p, rows, key), moved)
                return _steps.as_loss(loss)
            move = _steps.move(chosen, response, offset, params)
            return _steps.as_loss(chosen.loss(there, plus(params, move), rows, key))

        return _steps.over_groups(chosen, group, draw)

    grads = jax.value_and_grad(both, (0, 1))
    loss, (grad, of_response) = grads(carried.params, carried.response)
    return grad, of_response, (loss, loss)


def _difference(there: Any, center: Any) -> Any:
    return jax.tree.map(jnp.subtract, there, center)


_DELTA = Method("delta_stn", _difference, _of_delta)
_STN = Method("stn", lambda there, center: there, _of_stn)

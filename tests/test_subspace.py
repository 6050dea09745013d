"""The step rule, against a minimiser that knows nothing of it, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize
from test_kronecker import problem

import gnlin


def choose(
    rule,
    damping=0.05,
    rate=1.0,
    rhs_of=lambda gradient: gradient,
    direction_of=None,
    last_scale=0.1,
):
    """``(chosen, reference)``: the rule's step, and φ(α, β) by dense matrices."""
    objective, params, batch = problem()
    flat, unravel = ravel_pytree(params)
    gradient = oracles.gradient(objective, params, batch)
    rhs = rhs_of(gradient)
    direction = rhs if direction_of is None else direction_of(rhs)
    last = last_scale * np.cos(np.arange(len(flat)))
    chosen = compiled_choice(
        rule,
        objective,
        params,
        batch,
        damping,
        rate,
        unravel(jnp.asarray(direction)),
        unravel(jnp.asarray(rhs)),
        unravel(jnp.asarray(last)) if rule.momentum else (),
    )

    linearised = oracles.linearised_loss(objective, params, batch)
    curvature = oracles.ggn_matrix(objective, params, batch)

    def value(step):
        if rule.loss_model == "exact":
            change = float(linearised(flat + step)) - float(linearised(flat))
        else:
            change = gradient @ step + step @ curvature @ step / 2
        return change + (rhs - gradient) @ step + damping / 2 * step @ step

    def reference(weights):
        return value(-weights[0] * direction + (weights[1] * last if rule.momentum else 0))

    return chosen, reference, (direction, last)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled_choice(rule, objective, params, batch, damping, rate, direction, rhs, last):
    model = gnlin.quadratic_model(objective, params, batch)
    search = gnlin.Search(objective, batch, model, damping, direction, rhs, rate)
    chosen = rule.choose(search, last)
    return {name: getattr(chosen, name) for name in ("step", "change", "sound", "stats")}


def weights_of(chosen):
    return np.asarray([chosen["stats"]["subspace/length"], chosen["stats"]["subspace/momentum"]])


@pytest.mark.parametrize("loss_model", ["exact", "quadratic"])
@pytest.mark.parametrize("momentum", [False, True], ids=["length", "momentum"])
def test_step_minimises_the_damped_model(x64, loss_model, momentum):
    rule = gnlin.Subspace(momentum=momentum, loss_model=loss_model)
    chosen, reference, (direction, last) = choose(rule, direction_of=lambda rhs: 30 * rhs)
    found = minimize(
        reference,
        np.zeros(1 + momentum),
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-14},
    )
    weights = weights_of(chosen)[: 1 + momentum]
    # Newton's iteration ends when further progress is a thousandth of what was gained.
    assert reference(weights) <= found.fun + 2e-3 * abs(found.fun)
    if loss_model == "quadratic":
        np.testing.assert_allclose(weights, found.x, rtol=1e-4)
    step = -weights[0] * direction + (weights[1] * last if momentum else 0)
    np.testing.assert_allclose(ravel_pytree(chosen["step"])[0], step, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        chosen["change"] + 0.05 / 2 * step @ step, reference(weights), rtol=1e-8
    )


def test_other_updates_than_the_gradient_bend_the_model(x64):
    """Weight decay, say: u = ∇ℓ + wθ."""
    rule = gnlin.Subspace(loss_model="quadratic")
    chosen, reference, _ = choose(
        rule, rhs_of=lambda gradient: gradient + 0.3 * np.sin(np.arange(len(gradient)))
    )
    found = minimize(
        reference, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}
    )
    np.testing.assert_allclose(weights_of(chosen), found.x, rtol=1e-4)


def test_rate_and_norm_are_applied_last(x64):
    full, _, _ = choose(gnlin.Subspace())
    half, _, _ = choose(gnlin.Subspace(), rate=0.5)
    np.testing.assert_allclose(weights_of(half), 0.5 * weights_of(full), rtol=1e-12)
    length = np.linalg.norm(ravel_pytree(full["step"])[0])
    bounded, reference, _ = choose(gnlin.Subspace(max_norm=0.1 * float(length)))
    np.testing.assert_allclose(
        ravel_pytree(bounded["step"])[0], 0.1 * ravel_pytree(full["step"])[0], rtol=1e-10
    )
    np.testing.assert_allclose(
        bounded["change"] + 0.05 / 2 * (0.1 * length) ** 2,
        reference(weights_of(bounded)),
        rtol=1e-8,
    )


def test_parallel_zero_and_infinite_directions_are_harmless(x64):
    parallel, _, _ = choose(gnlin.Subspace(), direction_of=lambda rhs: np.cos(np.arange(len(rhs))))
    assert np.all(np.isfinite(weights_of(parallel)))
    still, _, _ = choose(gnlin.Subspace(), last_scale=0.0)
    alone, _, _ = choose(gnlin.Subspace(momentum=False))
    np.testing.assert_allclose(weights_of(still)[0], weights_of(alone)[0], rtol=1e-6)
    broken, _, _ = choose(gnlin.Subspace(), direction_of=lambda rhs: np.full(len(rhs), np.inf))
    assert not np.any(weights_of(broken))
    assert not np.any(ravel_pytree(broken["step"])[0])


@pytest.mark.parametrize("loss_model", ["exact", "quadratic"])
def test_of_a_zero_direction_nothing_is_asked(loss_model):
    """Solvers that fail give one; the last step still counts."""
    with jax.numpy_dtype_promotion("standard"):
        still, _, _ = choose(
            gnlin.Subspace(loss_model=loss_model), direction_of=lambda rhs: 0 * rhs
        )
        length, momentum = weights_of(still)
    assert length == 0
    assert 0 < abs(momentum) < 100


def quadratic_bowl(constant):
    """Linear regression whose loss ends at `constant`; its batches have targets of either sign."""
    x, w = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in ((0, (40, 5)), (1, (5, 3)))
    )

    def loss(outputs, batch):
        return constant + 0.5 * jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=1))

    objective = gnlin.Objective(lambda params, batch: batch["x"] @ params, loss)
    return objective, [{"x": x, "y": sign * (x @ w)} for sign in (1, -1)]


@pytest.mark.parametrize("constant", [0.0, 10.0, 1000.0])
def test_damping_survives_convergence(constant):
    """In float32 decreases drop below the resolution of the loss long before the end: no reason to
    raise λ.
    """
    objective, batches = quadratic_bowl(constant)
    transform = gnlin.gauss_newton(objective)

    @jax.jit
    def train(carry, batch):
        def step(_, carry):
            params, state = carry
            updates, state = transform.update(None, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 60, step, carry)

    carry = (jnp.zeros((5, 3)), transform.init(jnp.zeros((5, 3))))
    for batch in batches:
        carry = train(carry, batch)
        assert float(objective.value(carry[0], batch)) - constant < 1e-5 * (1 + constant)


def _dampings(transform, params, batches):
    state, found = transform.init(params), []
    update = jax.jit(lambda state, batch: transform.update(None, state, params, batch=batch))
    for batch in batches:
        updates, state = update(state, batch)
        found.append((float(gnlin.metrics(state)["damping"]), float(jnp.abs(updates).max())))
    return found


def test_a_rate_of_zero_says_nothing_about_the_damping():
    objective, (batch, _) = quadratic_bowl(0.0)
    transform = gnlin.gauss_newton(
        objective, learning_rate=lambda count: jnp.where(count < 8, 0.0, 1.0)
    )
    *waiting, (damping, largest) = _dampings(transform, jnp.zeros((5, 3)), [batch] * 9)
    assert {step for _, step in waiting} == {0.0}
    assert damping == waiting[0][0]
    assert largest > 0


def test_a_gradient_that_is_not_finite_says_nothing_about_the_damping():
    """An infinite input saturates a tanh: the loss is finite and its gradient is not."""

    def model(params, batch):
        return jnp.tanh(batch["x"] @ params)

    objective = gnlin.Objective(model, lambda outputs, batch: 0.5 * jnp.mean((outputs - 0.3) ** 2))
    x = jax.random.normal(jax.random.key(0), (20, 4))
    assert bool(jnp.isfinite(objective.value(jnp.ones((4, 2)), {"x": x.at[0, 0].set(jnp.inf)})))
    batches = [{"x": x.at[0, 0].set(jnp.inf)}] * 5 + [{"x": x}]
    transform = gnlin.gauss_newton(objective, damping=gnlin.GainRatio(1e-2))
    *bad, (damping, largest) = _dampings(transform, jnp.ones((4, 2)), batches)
    assert {step for _, step in bad} == {0.0}
    assert damping == bad[0][0]
    assert largest > 0


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_norm(max_norm):
    with pytest.raises(
        ValueError, match=r"`max_norm` must be (positive|finite and at least 0); got"
    ):
        gnlin.Subspace(max_norm=max_norm)


def test_bad_momentum():
    with pytest.raises(TypeError, match="`momentum` must be True or False; got "):
        gnlin.Subspace(0.1)  # pyright: ignore[reportArgumentType]


def test_bad_loss_model():
    with pytest.raises(ValueError, match="`loss_model` must be one of"):
        gnlin.Subspace(loss_model="cubic")

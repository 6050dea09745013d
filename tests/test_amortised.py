"""The default step of `gauss_newton`: kept factors, late trials, momentum, λ without units."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree

import gnlin
from gnlin.transforms.memory import digest

ROWS = 24


@functools.cache
def network(dtype):
    """tanh network 3-5-2, with one regression and one classification on it."""
    del dtype
    params = {
        "in": oracles.normal(3, 5, seed=1) / 2,
        "bias": oracles.normal(5, seed=2) / 4,
        "out": oracles.normal(5, 2, seed=3) / 2,
    }
    x = oracles.normal(4 * ROWS, 3, seed=0)
    batch = {"x": x, "y": jnp.sin(2 * x[:, :2]), "label": (x[:, 0] > 0).astype(int)}

    def model(params, batch):
        return jnp.tanh(batch["x"] @ params["in"] + params["bias"][None]) @ params["out"]

    return model, params, batch


def squared(outputs, batch):
    return 0.5 * jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=1))


def entropy(outputs, batch):
    chosen = jnp.take_along_axis(outputs, batch["label"][:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(outputs, axis=1) - chosen)


def batches_of(batch, steps, whole):
    if whole:
        return [batch] * steps
    size = len(batch["x"]) // 4
    order = [jax.tree.map(lambda leaf, i=i: leaf[i::4], batch) for i in range(4)]
    assert len(order[0]["x"]) == size
    return [order[i % 4] for i in range(steps)]


@functools.cache
def compiled(tx):
    return jax.jit(lambda state, params, batch: tx.update(None, state, params, batch=batch))


def run(tx, params, batches):
    """Parameters before each update and after the last one, and the metrics of all."""
    update = compiled(tx)
    state, path, metrics = tx.init(params), [params], []
    for batch in batches:
        updates, state = update(state, path[-1], batch)
        path.append(optax.apply_updates(path[-1], updates))
        metrics.append(gnlin.metrics(state))
    return path, metrics, state


@functools.cache
def default_with_units(loss):
    """The default on a loss and outputs in other units, which come with the batch."""
    model, _, _ = network(None)
    return gnlin.gauss_newton(
        gnlin.Objective(
            lambda params, batch: batch["unit"] * model(params, batch),
            lambda outputs, batch: batch["factor"] * loss(outputs, batch),
        )
    )


def in_units(batches, factor=1.0, unit=1.0):
    units = {"factor": jnp.asarray(factor, float), "unit": jnp.asarray(unit, float)}
    return [{**batch, **units, "y": unit * batch["y"]} for batch in batches]


@pytest.mark.parametrize(
    ("loss", "factor", "whole"),
    [(squared, 1e-6, True), (squared, 1e6, False), (entropy, 1e6, True), (entropy, 1e-6, False)],
)
def test_a_factor_on_the_loss_changes_no_step(x64, loss, factor, whole):
    _, params, batch = network(jnp.result_type(float))
    tx, batches = default_with_units(loss), batches_of(batch, 12, whole)
    one, of_one, _ = run(tx, params, in_units(batches))
    other, of_other, _ = run(tx, params, in_units(batches, factor))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(ravel_pytree(a)[0], ravel_pytree(b)[0], rtol=1e-6, atol=1e-7)
    for a, b in zip(of_one, of_other, strict=True):
        assert a["accepted"] == b["accepted"]
        np.testing.assert_allclose(factor * a["damping"], b["damping"], rtol=1e-6)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_of_outputs_changes_no_step(x64, unit):
    _, params, batch = network(jnp.result_type(float))
    tx, batches = default_with_units(squared), batches_of(batch, 12, False)
    one = run(tx, params, in_units(batches))[0]
    other = run(tx, params, in_units(batches, unit=unit))[0]
    np.testing.assert_allclose(ravel_pytree(one)[0], ravel_pytree(other)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_float32_reaches_the_same_loss_in_all_units(factor):
    _, params, batch = network(jnp.result_type(float))
    tx, batches = default_with_units(squared), batches_of(batch, 40, True)
    ends = []
    for c in (1.0, factor):
        _, metrics, _ = run(tx, params, in_units(batches, c))
        ends.append(float(metrics[-1]["loss"]) / c)
    # Roundings differ, and with them the path.
    assert ends[1] < 1.3 * ends[0] + 1e-6


def test_the_unit_of_damping_is_that_of_steepest_descent(x64):
    model, params, batch = network(jnp.result_type(float))
    objective = gnlin.Objective(model, entropy)
    _, metrics, _ = run(gnlin.gauss_newton(objective), params, [batch])
    theta, unravel = ravel_pytree(params)
    gradient = ravel_pytree(objective.value_and_grad(params, batch)[1])[0]
    quadratic = gnlin.quadratic_model(objective, params, batch)
    curvature = gradient @ ravel_pytree(quadratic.ggn(unravel(gradient)))[0]
    descent = gradient * (gradient @ gradient) / curvature
    promised = -quadratic.change(unravel(-descent))
    unit = 2 * promised / (theta @ theta + descent @ descent)
    np.testing.assert_allclose(metrics[0]["damping"], unit, rtol=1e-10)


def test_kept_factors_are_those_of_the_last_refresh(x64):
    """The slow other route: a record that refreshes always, asked at the refreshes alone."""
    model, params, batch = network(jnp.result_type(float))
    objective = gnlin.Objective(model, entropy)
    kept = gnlin.Kronecker(refresh=4, decay=0.9, fraction=1.0)
    always = gnlin.Kronecker(decay=0.9**4, fraction=1.0)

    @functools.partial(jax.jit, static_argnums=0)
    def solve(solver, state, params, damping, rhs):
        system = gnlin.quadratic_model(objective, params, batch).system(damping)
        solution, state = solver.solve(system, rhs, state)
        return solution.direction, state

    state, slow = kept.init(params)[0], always.init(params)[0]
    rhs = jax.tree.map(jnp.cos, params)
    place, expected, refreshed = params, None, []
    for count in range(14):
        damping = 0.1 if count < 9 else 0.5  # a larger λ is honoured at once
        before = state.count
        found, state = solve(kept, state, place, damping, rhs)
        if state.count > before:
            refreshed.append(count)
            expected, slow = solve(always, slow, place, damping, rhs)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
            found,
            expected,
        )
        place = jax.tree.map(lambda leaf: 0.95 * leaf, place)
    assert refreshed == [0, 1, 2, 3, 7, 9, 13]


class Curve:
    """ℓ = √(1 + θ²) − 1 of one parameter, whose Gauss-Newton step far out is too long."""

    def __init__(self):
        self.objective = gnlin.Objective(
            lambda p, batch: jnp.arctan(3 * p) + batch["x"][0],
            lambda outputs, batch: 0.5 * jnp.sum(outputs**2),
        )


@pytest.mark.parametrize("damping", [1e-4, gnlin.GainRatio(1e-4)])
def test_a_step_that_did_not_lower_the_loss_is_taken_back(x64, damping):
    """At 2 the tangent of the arctangent leads far beyond the minimum."""
    objective = Curve().objective
    tx = gnlin.gauss_newton(objective, damping=damping, solver=gnlin.Dense())
    batch = {"x": jnp.zeros(1)}
    path, metrics, _ = run(tx, jnp.asarray([2.0]), [batch] * 60)
    losses = [float(objective.value(params, batch)) for params in path]
    backs = [i for i, each in enumerate(metrics) if not each["accepted"]]
    # The first step is tried before it is taken. Then the batch is known.
    assert backs[:2] == [0, 2]
    np.testing.assert_array_equal(path[1], path[0])
    for i in (i for i in backs[1:] if losses[i - 1] > 1e-20):
        assert losses[i] >= losses[i - 1]  # equal, where versions of JAX round differently
        np.testing.assert_allclose(path[i + 1], path[i - 1], rtol=1e-12)
        assert metrics[i]["gain_ratio"] <= 0
    if not isinstance(damping, float):
        assert losses[-1] < 1e-12


def test_every_rise_on_one_batch_is_taken_back(x64):
    model, params, batch = network(jnp.result_type(float))
    objective = gnlin.Objective(model, squared)
    path, metrics, _ = run(gnlin.gauss_newton(objective), params, [batch] * 30)
    losses = [float(objective.value(params, batch)) for params in path]
    for i in range(1, 30):
        # The update with number i sees the loss that the step before it has led to.
        assert (losses[i] <= losses[i - 1]) or not metrics[i]["accepted"]


def test_trials_on_other_batches(x64):
    """The first three steps, and then every `check`-th at least: the others are never tried."""
    model, params, batch = network(jnp.result_type(float))
    objective = gnlin.Objective(model, squared)
    _, metrics, _ = run(
        gnlin.gauss_newton(objective, step=gnlin.Momentum(every=1, check=4)),
        params,
        batches_of(batch, 16, False),
    )
    changed = [i for i in range(1, 16) if metrics[i]["gain_ratio"] != metrics[i - 1]["gain_ratio"]]
    # Alarms may add some.
    assert {1, 2, 6, 10, 14} <= set(changed)
    assert len(changed) < 10


def test_a_wrapper_that_scales_steps_gets_no_verdict_on_them(x64):
    """Half of the step was made, and the promise was for the whole."""
    model, params, batch = network(jnp.result_type(float))
    objective = gnlin.Objective(model, squared)
    tx = optax.chain(gnlin.gauss_newton(objective), optax.scale(0.5))
    path, metrics, _ = run(tx, params, [batch] * 12)
    assert all(each["accepted"] for each in metrics)
    assert len({float(each["gain_ratio"]) for each in metrics[1:]}) == 1
    assert objective.value(path[-1], batch) < objective.value(params, batch)


class Identity:
    """A solver whose direction is the right-hand side."""

    direction_only = True

    def init(self, params):
        return (), {}

    def solve(self, system, rhs, state):
        return gnlin.Solution(rhs, {}), state


def test_the_conjugate_direction_is_that_of_hestenes_and_stiefel(x64):
    """With one solve and the exact length it is the method of conjugate gradients."""
    matrix = jnp.asarray(np.diag([1.0, 2.0, 3.0, 4.0]) + 0.3)
    target = jnp.asarray([1.0, -2.0, 0.5, 1.0])
    root = jnp.linalg.cholesky(matrix).T
    objective = gnlin.Objective.least_squares(lambda p: root @ p - target)

    tx = gnlin.gauss_newton(objective, damping=0.0, solver=Identity())
    update, params, state = jax.jit(tx.update), jnp.zeros(4), tx.init(jnp.zeros(4))
    for _ in range(5):
        updates, state = update(None, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, jnp.linalg.solve(root, target), rtol=1e-8)


def test_momentum_is_that_of_nesterov(x64):
    """Against the formula, with an identity for the solver and lengths from the quadratic model."""
    model, params, batch = network(jnp.result_type(float))
    objective = gnlin.Objective(model, squared)

    batches = batches_of(batch, 9, False)
    tx = gnlin.gauss_newton(
        objective,
        damping=0.3,
        solver=Identity(),
        step=gnlin.Momentum(0.7, every=2, check=100),
        learning_rate=0.8,
    )
    path, metrics, _ = run(tx, params, batches)
    theta, unravel = ravel_pytree(params)
    moment, length, bound, age = 0.0, None, None, 0
    trend = None
    for count, each in enumerate(batches):
        point = unravel(theta)
        value, gradient = objective.value_and_grad(point, each)
        value, gradient = float(value), ravel_pytree(gradient)[0]
        alarm = trend is not None and value > 1.1 * trend
        trend = value if trend is None else 0.7 * trend + 0.3 * value
        moment = gradient + (0.7 * moment if count else 0)
        direction = gradient + 0.7 * moment
        if count < 3 or age >= 1 or alarm:
            quadratic = gnlin.quadratic_model(objective, point, each)
            curvature = direction @ ravel_pytree(quadratic.ggn(unravel(direction)))[0]
            length = gradient @ direction / (curvature + 0.3 * direction @ direction)
            bound, age = length * jnp.linalg.norm(direction), 0
            step = 0.8 * length * direction
        else:
            step = 0.8 * min(length, bound / jnp.linalg.norm(direction)) * direction
            age += 1
        assert metrics[count]["accepted"]
        theta = theta - step
        np.testing.assert_allclose(ravel_pytree(path[count + 1])[0], theta, rtol=1e-7, atol=1e-9)


def test_the_digest_tells_batches_apart():
    base = {
        "x": jnp.arange(12.0).reshape(3, 4),
        "i": jnp.arange(5),
        "b": jnp.array([True, False]),
        "h": jnp.ones(3, jnp.bfloat16),
        "key": jax.random.key(3),
        "none": jnp.zeros((0, 2)),
    }
    changes = [
        {"x": base["x"][::-1]},
        {"x": -base["x"]},
        {"x": base["x"].at[1, 2].add(1e-6)},
        {"i": base["i"].at[0].add(1)},
        {"b": ~base["b"]},
        {"h": base["h"].at[1].set(2)},
        {"key": jax.random.key(4)},
    ]
    words = [np.asarray(jax.jit(digest)({**base, **change})) for change in [{}, *changes]]
    np.testing.assert_array_equal(words[0], digest(base))
    assert len({tuple(each) for each in words}) == len(words)
    assert digest(None).shape == (2,)


@pytest.mark.parametrize("whole", [True, False])
def test_a_batch_of_nan_between_two_updates_changes_neither(x64, whole):
    model, params, batch = network(jnp.result_type(float))
    tx = gnlin.gauss_newton(gnlin.Objective(model, squared))
    batches = batches_of(batch, 8, whole)
    bad = {**batches[0], "x": batches[0]["x"].at[0, 0].set(jnp.nan)}
    plain = run(tx, params, batches)[0]
    path, metrics, _ = run(tx, params, [*batches[:5], bad, bad, *batches[5:]])
    assert not metrics[5]["accepted"]
    np.testing.assert_array_equal(ravel_pytree(path[5])[0], ravel_pytree(path[7])[0])
    np.testing.assert_allclose(ravel_pytree(path[-1])[0], ravel_pytree(plain[-1])[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda o: gnlin.Kronecker(refresh=0), "`refresh` must be an integer of at least 1"),
        (lambda o: gnlin.Momentum(1.0), r"`coefficient` must lie in \[0, 1\)"),
        (lambda o: gnlin.Momentum(every=0), "`every` must be an integer of at least 1"),
        (lambda o: gnlin.Momentum(check=0), "`check` must be an integer of at least 1"),
        (lambda o: gnlin.GainRatio(1.0, minimum_again=0.0), "`minimum_again` must be positive"),
        (lambda o: gnlin.GainRatio(1.0, relative=1), "`relative` must be True or False"),
        (
            lambda o: gnlin.levenberg_marquardt(o, damping=gnlin.GainRatio(1.0, relative=True)),
            "`damping` must be absolute here",
        ),
    ],
)
def test_bad_options(build, message):
    objective = gnlin.Objective.least_squares(lambda p: p)
    with pytest.raises((ValueError, TypeError), match=message):
        build(objective)


def test_the_default_is_what_the_figures_are_of():
    parameters = inspect.signature(gnlin.gauss_newton).parameters
    options = {name: each.default for name, each in parameters.items() if name != "objective"}
    assert options == {
        "learning_rate": "auto",
        "damping": gnlin.GainRatio(1.0, minimum=0.1, relative=True, minimum_again=1e-3),
        "solver": gnlin.Kronecker(refresh=5),
        "step": "auto",  # see tests/test_eigenbasis.py
    }
    assert gnlin.Momentum() == gnlin.Momentum(0.6, every=2, check=5)


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A solver that fails."""

    def init(self, params):
        return (), {}

    def solve(self, system, rhs, state):
        return gnlin.Solution(jax.tree.map(jnp.zeros_like, rhs), {}), state


@pytest.mark.parametrize("start", [1.0, 0.0], ids=["failed", "solved"])
def test_a_step_of_zeros_is_good_where_the_gradient_is_zero(x64, start):
    objective = gnlin.Objective(lambda p, batch: batch * p, lambda z, batch: jnp.sum(z**2))
    policy = gnlin.GainRatio(1.0, minimum=1e-3)
    tx = gnlin.gauss_newton(objective, damping=policy, solver=Zeros())
    _, metrics, _ = run(tx, jnp.full(2, start), [jnp.ones(2)] * 6)
    ratios = [float(each["gain_ratio"]) for each in metrics]
    damping = [float(each["damping"]) for each in metrics]
    if start == 0:
        assert ratios[1:] == [1.0] * 5
        assert damping[-1] < damping[0] / 10
    else:
        # A step that is taken back is not tried again.
        assert set(ratios[1:]) == {-np.inf}
        assert damping[-1] > damping[0] * 10


def test_a_policy_reports_its_last_trial():
    """Steps between are not tried, and a policy has nothing to say about them."""

    @dataclasses.dataclass(frozen=True)
    class Told:
        def init(self, params):
            return jnp.ones([]), {"told/length": jnp.zeros([]), "told/radius": jnp.zeros([])}

        def damping(self, state, count):
            return state

        def judge(self, state, trial):
            told = {"told/length": trial.length, "told/radius": jnp.asarray(trial.radius)}
            return state, jnp.asarray(True), told

    model, params, batch = network(jnp.float32)
    objective = gnlin.Objective(model, squared)
    tx = gnlin.gauss_newton(objective, damping=Told(), step=gnlin.Momentum(check=4))
    _, metrics, _ = run(tx, params, batches_of(batch, 8, whole=False))
    assert all(each["told/radius"] == jnp.inf for each in metrics)
    told = [float(each["told/length"]) for each in metrics]
    # The first three are tried, and every fourth after them.
    assert [told.index(length) for length in told] == [0, 1, 2, 2, 2, 2, 6, 6]
    assert min(told) > 0


def test_a_solver_may_widen_its_state():
    """bfloat16 parameters and an average in float32, from zeros like the parameters."""

    @dataclasses.dataclass(frozen=True)
    class Averaged:
        def init(self, params):
            return jax.tree.map(jnp.zeros_like, params), {}

        def solve(self, system, rhs, state):
            mean = jax.tree.map(
                lambda old, new: 0.5 * old.astype(jnp.float32) + 0.5 * new.astype(jnp.float32),
                state, rhs,
            )  # fmt: skip
            direction = jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), mean, rhs)
            return gnlin.Solution(direction, {}), mean

    model, params, batch = network(jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    objective = gnlin.Objective(
        lambda p, batch: model(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p), batch),
        squared,
    )
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), batch)
    batch = {**batch, "x": batch["x"].astype(jnp.float32), "y": batch["y"].astype(jnp.float32)}
    tx = gnlin.gauss_newton(objective, solver=Averaged())
    with jax.numpy_dtype_promotion("standard"):
        _, metrics, state = run(tx, params, [batch] * 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.solver)} == {jnp.dtype(jnp.float32)}
    assert metrics[-1]["loss"] < metrics[0]["loss"]

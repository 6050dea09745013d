"""Our transforms under the wrappers of Optax, and under the drivers of other packages."""

import chex
import jax
import jax.numpy as jnp

# After gnlin, which silences the notice that this package is no longer developed  # isort: skip
import jaxopt
import numpy as np
import optax
import optimistix
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from problems import classifier, full_steps, linear_regression, third_party, tolerance, train

import gnlin


@pytest.fixture(autouse=True)
def _usual_promotion(_strict):
    """Most of what is computed here is the wrapper's own; that ours obeys the strict rules is
    checked elsewhere.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


PERIOD = 3


def damped():
    return gnlin.GainRatio(1.0)


def mean_loss(problem, params):
    return np.mean([float(problem.objective.value(params, batch)) for batch in problem.batches])


# Wrappers that own the parameters they evaluate at.


@pytest.mark.parametrize(
    "inner",
    [
        lambda objective: optax.chain(gnlin.linearise_gradients(objective, PERIOD), optax.sgd(0.5)),
        lambda objective: full_steps(objective, 0.3, 0.9),
    ],
    ids=["linearise_gradients", "gauss_newton"],
)
def test_schedule_free(inner):
    """Its averaged parameters descend; the gradients are taken, as it asks, where it evaluates."""
    problem = classifier()
    tx = optax.contrib.schedule_free(inner(problem.objective), learning_rate=0.5, b1=0.9)
    params, opt_state = train(
        tx.update, problem.objective, problem.params, tx.init(problem.params), problem.batches
    )
    averaged = optax.contrib.schedule_free_eval_params(opt_state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(averaged, problem.params)
    assert mean_loss(problem, averaged) < mean_loss(problem, problem.params)


@pytest.mark.parametrize(
    "fast",
    [
        lambda objective: optax.chain(gnlin.linearise_gradients(objective, PERIOD), optax.sgd(0.5)),
        lambda objective: gnlin.gauss_newton(objective, learning_rate=0.9, damping=damped()),
    ],
    ids=["linearise_gradients", "gauss_newton"],
)
def test_lookahead_with_a_bound_objective(fast):
    """`optax.lookahead` hands no extra arguments on, so the data must be bound to the objective."""
    problem = classifier()
    batch = problem.batches[0]
    bound = problem.objective.bind(batch)
    tx = optax.lookahead(fast(bound), sync_period=2, slow_step_size=0.5)
    start = jax.tree.map(jnp.array, problem.params)
    params = optax.LookaheadParams.init_synced(start)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(bound.value)(params.fast), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(6):
        params, opt_state = step(params, opt_state)
    assert float(bound.value(params.slow)) < float(bound.value(start))


def test_lookahead_without_it_names_the_remedy():
    problem = classifier()
    tx = optax.lookahead(
        gnlin.gauss_newton(problem.objective, damping=0.3), sync_period=2, slow_step_size=0.5
    )
    params = optax.LookaheadParams.init_synced(problem.params)
    with pytest.raises(ValueError, match=r"`batch` is missing.*objective\.bind\(batch\)"):
        tx.update(problem.params, tx.init(params), params)


# Accumulated micro-batches.


def test_multi_steps_accumulates_linearised_gradients():
    """In the documented order each micro-batch is linearised at the anchor of its time, and the
    mean is applied.

    Reference: the loop by hand. With period 4 and 2 micro-batches θ moves after micro-steps 1, 3
    and 5 (from 0), and the anchor is taken before micro-steps 0 and 4, when θ has moved twice.
    """
    problem = classifier()
    objective = problem.objective
    rate = 0.5
    tx = optax.chain(
        gnlin.linearise_gradients(objective, 4),
        optax.MultiSteps(
            third_party(optax.sgd(rate)), every_k_schedule=2
        ).gradient_transformation(),
    )
    ours, opt_state = train(
        tx.update, objective, problem.params, tx.init(problem.params), problem.batches
    )

    gradient = jax.jit(lambda *args: gnlin.linearised_value_and_grad(objective)(*args)[1])
    params = problem.params
    for index in range(0, len(problem.batches), 2):
        if index % 4 == 0:
            anchor = params
        first, second = (
            gradient(params, anchor, batch) for batch in problem.batches[index : index + 2]
        )
        params = jax.tree.map(lambda p, a, b: p - rate * (a + b) / 2, params, first, second)
    chex.assert_trees_all_close(ours, params, **tolerance(jnp.float32, 50))
    chex.assert_trees_all_close(gnlin.anchor(opt_state), anchor, **tolerance(jnp.float32, 50))
    assert gnlin.metrics(opt_state)["linearise/refreshes"] == 2


def test_multi_steps_leaves_the_parameters_between():
    problem = classifier()
    tx = optax.chain(
        gnlin.linearise_gradients(problem.objective, 4),
        optax.MultiSteps(optax.sgd(0.5), 3).gradient_transformation(),
    )
    state = tx.init(problem.params)
    update = jax.jit(
        lambda state, batch: tx.update(problem.params, state, problem.params, batch=batch)
    )
    for index, batch in enumerate(problem.batches[:3]):
        updates, state = update(state, batch)
        moved = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(updates))
        assert (moved > 0) == (index == 2)


# How far: line searches behind a direction.

SEARCHES = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(max_backtracking_steps=20),
    "zoom": lambda: optax.scale_by_zoom_linesearch(max_linesearch_steps=20),
}
DIRECTIONS = {
    "gauss_newton": lambda objective: full_steps(objective, 0.01),
    "scale_by_gauss_newton": lambda objective: optax.chain(
        gnlin.scale_by_gauss_newton(objective, 0.01, solver=gnlin.CG(max_iterations=10)),
        optax.scale(-1.0),
    ),
    "prox_linear": lambda objective: gnlin.prox_linear(optax.sgd(0.5), objective, 10),
}


@pytest.mark.parametrize(
    ("direction", "search"),
    [
        ("gauss_newton", "backtracking"),
        ("gauss_newton", "zoom"),
        ("scale_by_gauss_newton", "zoom"),
        ("prox_linear", "backtracking"),
    ],
)
def test_line_search_makes_the_loss_decrease(direction, search):
    """A full step with little damping may diverge on a softmax loss; with a search behind it every
    step descends.
    """
    problem = classifier()
    objective, batch = problem.objective, problem.batches[0]
    tx = optax.chain(DIRECTIONS[direction](objective), SEARCHES[search]())

    @jax.jit
    def step(params, opt_state):
        value, grads = objective.value_and_grad(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, grad=grads, value_fn=objective.value, batch=batch
        )
        return optax.apply_updates(params, updates), opt_state, value

    params, opt_state = problem.params, tx.init(problem.params)
    losses = []
    for _ in range(6):
        params, opt_state, value = step(params, opt_state)
        losses.append(float(value))
    assert np.all(np.diff(losses) < 0), losses


def test_inner_optimiser_with_a_line_search():
    """L-BFGS on the linearised problem finds the value function of it in its arguments."""
    problem = classifier()
    tx = gnlin.iterative_linearisation(optax.lbfgs(), problem.objective, PERIOD, reset_inner=True)
    batches = [problem.batches[0]] * 6
    params, _ = train(
        tx.update, problem.objective, problem.params, tx.init(problem.params), batches
    )
    assert float(problem.objective.value(params, batches[0])) < float(
        problem.objective.value(problem.params, batches[0])
    )


# Drivers of other packages.


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.readout = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.readout(jnp.tanh(self.hidden(x)))


@pytest.mark.parametrize(
    "build",
    [
        lambda objective: optax.chain(gnlin.linearise_gradients(objective, PERIOD), optax.sgd(0.5)),
        lambda objective: gnlin.gauss_newton(objective, learning_rate=0.9, damping=damped()),
        lambda objective: gnlin.levenberg_marquardt(objective, damping=1.0, solver=gnlin.Dense()),
    ],
    ids=["linearise_gradients", "gauss_newton", "levenberg_marquardt"],
)
def test_flax_optimizer(build):
    """`nnx.Optimizer.update(model, grads, batch=batch)`, the model rebuilt from its graph in the
    objective.
    """
    problem = classifier()
    model = Network(nnx.Rngs(0))
    graph, _ = nnx.split(model)
    objective = gnlin.Objective(
        lambda params, batch: nnx.merge(graph, params)(batch["x"]), problem.objective.loss
    )
    optimizer = nnx.Optimizer(model, build(objective), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        value, grads = nnx.value_and_grad(lambda model: objective.loss(model(batch["x"]), batch))(
            model
        )
        optimizer.update(model, grads, batch=batch)
        return value

    batch = problem.batches[0]
    losses = [float(step(model, optimizer, batch)) for _ in range(5)]
    assert losses[-1] < losses[0]
    as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # renamed in Flax 0.12
    assert (
        gnlin.metrics(as_pure(optimizer.opt_state)).keys()
        == gnlin.metrics(build(objective).init(problem.params)).keys()
    )


DRIVEN = {
    "linearise_gradients": lambda objective: optax.chain(
        gnlin.linearise_gradients(objective, PERIOD), optax.sgd(0.5)
    ),
    "iterative_linearisation": lambda objective: gnlin.iterative_linearisation(
        optax.sgd(0.5), objective, PERIOD, line_search=(1.0, 0.5)
    ),
    "prox_linear": lambda objective: gnlin.prox_linear(optax.sgd(0.5), objective, 5),
    "gauss_newton": lambda objective: gnlin.gauss_newton(objective, damping=1e-3),
    "levenberg_marquardt": lambda objective: gnlin.levenberg_marquardt(objective),
    "adam": lambda objective: optax.adam(0.05),
    "lbfgs": lambda objective: optax.lbfgs(),
}
each_driven = pytest.mark.parametrize("build", DRIVEN.values(), ids=DRIVEN.keys())


def assert_solves_regression(found, solution):
    # Drivers stop at a gradient of 1e-4, and the Hessian is I.
    np.testing.assert_allclose(found["w"], solution["w"], atol=1e-3)


@pytest.mark.parametrize(
    "name", [name for name in DRIVEN if name != "lbfgs"]
)  # it needs the value, which is not passed
def test_jaxopt_solver(name):
    problem, solution = linear_regression()
    bound = problem.objective.bind(problem.batches[0])
    solver = jaxopt.OptaxSolver(fun=bound.value, opt=DRIVEN[name](bound), maxiter=400, tol=1e-4)
    found, state = solver.run(problem.params)
    assert_solves_regression(found, solution)
    assert state.error <= 1e-4


@each_driven
def test_optimistix_minimiser(build):
    problem, solution = linear_regression()
    bound = problem.objective.bind(problem.batches[0])
    solver = optimistix.OptaxMinimiser(build(bound), rtol=1e-6, atol=1e-6)
    found = optimistix.minimise(
        lambda params, _: bound.value(params), solver, problem.params, max_steps=400, throw=False
    )
    assert_solves_regression(found.value, solution)


@each_driven
def test_minimise(build):
    """Our own driver hands over the batch and all that Optax's optimisers ask for."""
    problem, solution = linear_regression()
    found, info = gnlin.minimise(
        problem.objective,
        problem.params,
        build(problem.objective),
        batch=problem.batches[0],
        max_steps=400,
        tol=1e-4,
    )
    assert_solves_regression(found, solution)
    assert info.converged
    assert info.steps < 400
    np.testing.assert_allclose(
        info.value, problem.objective.value(found, problem.batches[0]), **tolerance(jnp.float32)
    )


def test_minimise_stays_where_the_gradient_is_small_enough():
    """The update that would follow it might lead far away."""
    problem, solution = linear_regression()
    batch = problem.batches[0]
    far = third_party(optax.sgd(100.0))
    found, info = gnlin.minimise(
        problem.objective, solution, far, batch=batch, max_steps=5, tol=1e-3
    )
    assert info.converged
    np.testing.assert_array_equal(found["w"], solution["w"])


# Reading the state through nestings.


def visible(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


NESTINGS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.1)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("ours", tx)),
    "masked": lambda tx: optax.masked(tx, visible),
    "partition": lambda tx: optax.partition(
        {True: tx, False: optax.set_to_zero()}, lambda params: jax.tree.map(bool, visible(params))
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(0.1),
    "all_at_once": lambda tx: optax.apply_if_finite(
        optax.named_chain(("part", optax.masked(optax.chain(tx, optax.scale(0.1)), visible))), 3
    ),
}


@pytest.mark.parametrize("wrap", NESTINGS.values(), ids=NESTINGS.keys())
def test_state_is_read_through(wrap):
    """Metrics, the anchor and predictions are those of the bare transform, under `jit` too."""
    problem = classifier()
    objective, params, batch = problem.objective, problem.params, problem.batches[0]
    bare = gnlin.linearise_gradients(objective, PERIOD)
    tx = wrap(bare)
    assert gnlin.metrics(tx.init(params)).keys() == gnlin.metrics(bare.init(params)).keys()

    @jax.jit
    def look(params):
        grads = jax.grad(objective.value)(params, batch)
        _, opt_state = tx.update(grads, tx.init(params), params, batch=batch, all_params=params)
        elsewhere = jax.tree.map(lambda leaf: 1.5 * leaf, params)
        return (
            gnlin.metrics(opt_state),
            jax.tree.leaves(gnlin.anchor(opt_state)),
            gnlin.predict(objective, opt_state, elsewhere, batch),
        )

    metrics, anchored, outputs = look(params)
    assert metrics["linearise/refreshes"] == 1
    kept = [
        leaf for leaf in jax.tree.leaves(params) if any(leaf.shape == a.shape for a in anchored)
    ]
    chex.assert_trees_all_equal(anchored, kept)
    elsewhere = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    # Leaves that no anchor holds (biases, zero here) contribute nothing to either.
    expected = gnlin.linearise(objective, params, batch).predict(elsewhere)
    np.testing.assert_allclose(outputs, expected, **tolerance(jnp.float32, 50))


def test_wrapper_of_our_own_is_read_through():
    problem = classifier()
    inner = gnlin.iterative_linearisation(
        optax.sgd(0.1), problem.objective, PERIOD, line_search=(1.0,)
    )
    state = optax.chain(inner, optax.scale(1.0)).init(problem.params)
    assert {
        "linearise/age",
        "linearise/loss",
        "linearise/refreshes",
        "line_search/alpha",
    } == gnlin.metrics(state).keys()
    chex.assert_trees_all_equal(gnlin.anchor(state), problem.params)


def test_metrics_of_the_same_name_are_numbered():
    problem, _ = linear_regression()
    objective, batch = problem.objective, problem.batches[0]
    tx = optax.chain(
        gnlin.scale_by_gauss_newton(objective, 0.5), gnlin.scale_by_gauss_newton(objective, 0.25)
    )
    _, state = tx.update(None, tx.init(problem.params), problem.params, batch=batch)
    metrics = gnlin.metrics(state)
    assert metrics["damping"] == 0.5
    assert metrics["damping/1"] == 0.25
    assert {"cg/iterations", "cg/iterations/1", "cg/residual", "cg/residual/1"} <= metrics.keys()


def test_prediction_follows_the_anchor_through_a_cycle():
    """Linearised while the anchor is used again; the true model where the next update moves it, or
    without one.
    """
    problem = classifier()
    objective, batch = problem.objective, problem.batches[0]
    tx = optax.chain(gnlin.linearise_gradients(objective, 2), optax.sgd(0.5))
    params, state = problem.params, tx.init(problem.params)
    update = jax.jit(lambda state, params: tx.update(None, state, params, batch=batch))
    for age in range(4):
        previous = params
        updates, state = update(state, params)
        params = optax.apply_updates(params, updates)
        true = objective.model(params, batch)
        linear = gnlin.linearise(objective, previous, batch).predict(params)
        expected = linear if age % 2 == 0 else true
        np.testing.assert_allclose(
            gnlin.predict(objective, state, params, batch), expected, **tolerance(jnp.float32, 50)
        )
        assert float(jnp.max(jnp.abs(true - linear))) > 1e-4
    np.testing.assert_array_equal(
        gnlin.predict(objective, optax.sgd(0.1).init(params), params, batch),
        objective.model(params, batch),
    )


@pytest.mark.parametrize(
    "wrap", [optax.chain, lambda tx: optax.MultiSteps(tx, 2)], ids=["chain", "multi_steps"]
)
def test_state_without_ours_has_no_metrics(wrap):
    assert gnlin.metrics(wrap(optax.adam(1e-3)).init(classifier().params)) == {}


def test_masked_gauss_newton_preconditions_what_it_sees():
    """The step on the visible leaves is that of the problem in those leaves; the others pass their
    gradient on.
    """
    problem = classifier()
    objective, params, batch = problem.objective, problem.params, problem.batches[0]
    grads = jax.jit(jax.grad(objective.value))(params, batch)
    tx = optax.masked(gnlin.scale_by_gauss_newton(objective, 0.1, solver=gnlin.Dense()), visible)
    update = jax.jit(
        lambda params: tx.update(grads, tx.init(params), params, batch=batch, all_params=params)[0]
    )
    updates = update(params)
    np.testing.assert_array_equal(updates["hidden"][1], grads["hidden"][1])

    weights = (params["hidden"][0], params["readout"]["w"])

    def outputs(weights):
        full = {
            "hidden": (weights[0], params["hidden"][1]),
            "readout": {"w": weights[1], "b": None},
        }
        return objective.model(full, batch)

    flat, unravel = ravel_pytree(weights)
    jacobian = jax.jit(jax.jacobian(lambda v: outputs(unravel(v)).ravel()))(flat)
    shape = outputs(weights).shape
    hessian = jax.jit(jax.hessian(lambda z: objective.loss(z.reshape(shape), batch)))(
        outputs(weights).ravel()
    )
    matrix = jacobian.T @ hessian @ jacobian + 0.1 * jnp.eye(flat.size)
    rhs = ravel_pytree((grads["hidden"][0], grads["readout"]["w"]))[0]
    step = ravel_pytree((updates["hidden"][0], updates["readout"]["w"]))[0]
    # The condition number here is about 10, and a solve in float32 loses as many units.
    np.testing.assert_allclose(step, jnp.linalg.solve(matrix, rhs), **tolerance(jnp.float32, 200))

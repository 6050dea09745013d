"""Function-space solves and their kernel matrix against dense references in NumPy."""

import functools
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from problems import full_steps, third_party, tolerance

import gnlin
from gnlin.kernel.gram import kernel_matrix
from gnlin.solve.dual import Dual, DualState

N = 5


class Case(NamedTuple):
    model: object
    params: object
    batch: object
    loss: object
    pull_backs: int  # that K should take


def squared(outputs, batch):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs)) / len(batch["x"])


def softmax(outputs, batch):
    """Weighted, and of singular Hessian."""
    labels = jax.nn.one_hot(
        jnp.arange(N) % outputs.shape[-1], outputs.shape[-1], dtype=outputs.dtype
    )
    labels = jnp.broadcast_to(labels.reshape(N, *[1] * (outputs.ndim - 2), -1), outputs.shape)
    losses = jax.nn.logsumexp(outputs, axis=-1) - jnp.sum(outputs * labels, axis=-1)
    weights = (
        jnp.asarray([1.0, 0, 2, 1, 0.5]).astype(outputs.dtype).reshape(N, *[1] * (losses.ndim - 1))
    )
    return jnp.sum(weights * losses)


def hidden(params, x):
    return jnp.tanh(
        jnp.einsum("...i,ij->...j", x, params["in"])
        + params["bias"].reshape(*[1] * (x.ndim - 1), -1)
    )


def perceptron(params, batch):
    return hidden(params, batch["x"]) @ params["out"]


def transposed(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]) @ params["back"].T


def tokens(params, batch):
    return jnp.einsum("nti,ij->ntj", hidden(params, batch["tokens"]), params["out"])


def pooled(params, batch):
    """A normalised sequence with attention inside each example, and one output vector."""
    h = hidden(params, batch["tokens"])
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 0.1) * params["scale"][None, None, :]
    scores = jax.nn.softmax(jnp.einsum("nti,nsi->nts", h, h), axis=-1)
    return jnp.mean(scores @ h, axis=1) @ params["out"]


def convolution(params, batch):
    images = batch["images"]
    numbers = jax.lax.conv_dimension_numbers(
        images.shape, params["kernel"].shape, ("NHWC", "HWIO", "NHWC")
    )
    h = jax.lax.conv_general_dilated(
        images, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers
    )
    h = jnp.tanh(h + params["shift"][None, None, None, :])
    return jnp.max(h.reshape(N, 2, 2, 2, 2, 2), axis=(2, 4)).reshape(N, -1)[:, :5] @ params["out"]


def batch_statistics(params, batch):
    h = hidden(params, batch["x"])
    h = (h - jnp.mean(h, axis=0, keepdims=True)) / jnp.sqrt(jnp.var(h, axis=0, keepdims=True) + 0.1)
    return h @ params["out"]


def attention_over_the_batch(params, batch):
    h = hidden(params, batch["x"])
    return jax.nn.softmax(h @ h.T, axis=-1) @ (h @ params["out"])


def permuted(params, batch):
    return perceptron(params, batch)[::-1] + jnp.cumsum(perceptron(params, batch), axis=0)


def shared(params, batch):
    return hidden(params, hidden(params, batch["x"]) @ params["square"]) @ params["square"]


def embedded(params, batch):
    return jnp.tanh(params["table"][jnp.arange(N) % 3]) @ params["out"]


def pytree(params, batch):
    z = perceptron(params, batch)
    return {"a": z[:, 0], "b": (z[:, 1:], jnp.sum(z))}


def rows_of_a_pytree(params, batch):
    z = perceptron(params, batch)
    return {"a": jnp.sum(z, axis=1), "b": z[:, :2].reshape(-1, 1, 2)}


def _cases():
    weights = {
        "in": oracles.normal(3, 5, seed=1),
        "bias": oracles.normal(5, seed=2),
        "out": oracles.normal(5, 4, seed=3),
        "back": oracles.normal(4, 5, seed=4),
        "scale": 1 + 0.1 * oracles.normal(5, seed=5),
        "kernel": oracles.normal(3, 3, 1, 2, seed=6),
        "shift": oracles.normal(2, seed=7),
        "square": oracles.normal(5, 3, seed=8),
        "table": oracles.normal(3, 5, seed=9),
    }
    batch = {
        "x": oracles.normal(N, 3, seed=10),
        "tokens": oracles.normal(N, 2, 3, seed=11),
        "images": oracles.normal(N, 4, 4, 1, seed=12),
    }

    def case(model, names, loss, pull_backs):
        return Case(
            model,
            {**{name: weights[name] for name in names.split()}, "none": None},
            batch,
            loss,
            pull_backs,
        )

    dense = "in bias out"
    return {
        "scalar": case(lambda p, b: jnp.mean(perceptron(p, b)), dense, lambda z, b: jnp.cosh(z), 1),
        "squared": case(perceptron, dense, squared, 4),
        "softmax": case(perceptron, dense, softmax, 4),
        "one output": case(lambda p, b: perceptron(p, b)[:, 0], dense + " back", squared, 1),
        "transposed": case(transposed, "in back", softmax, 4),
        "tokens": case(tokens, dense, softmax, 8),
        "pooled": case(pooled, dense + " scale", softmax, 4),
        "convolution": case(convolution, "kernel shift out", squared, 4),
        "rows of a pytree": case(rows_of_a_pytree, dense, squared, 3),
        # Here examples are mixed, or it cannot be said that they are not: one pull-back for each
        # output of the batch.
        "pytree": case(pytree, dense, squared, 4 * N + 1),
        "batch statistics": case(batch_statistics, dense, softmax, 4 + 4 * N),
        "attention over the batch": case(attention_over_the_batch, dense, squared, 4 * N),
        "permuted": case(permuted, dense, squared, 4 * N),
        "shared weights": case(shared, "in bias square", squared, 3),
        "embedded": case(embedded, "table out", squared, 4 + 4 * N),
    }


CASES = (
    *(
        "scalar",
        "squared",
        "softmax",
        "one output",
        "transposed",
        "tokens",
        "pooled",
        "convolution",
    ),
    *("rows of a pytree", "pytree", "batch statistics", "attention over the batch", "permuted"),
    *("shared weights", "embedded"),
)


def _raveled(tree):
    return ravel_pytree(tree)[0]


def _flat(tree):
    return np.asarray(_raveled(tree))


@functools.partial(jax.jit, static_argnums=0)
def _jacobian_of(model, params, batch):
    flat, unravel = ravel_pytree(params)
    return jax.jacrev(lambda vector: ravel_pytree(model(unravel(vector), batch))[0])(flat)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hessian_of(model, loss, params, batch):
    outputs, unravel = ravel_pytree(model(params, batch))
    return jax.hessian(lambda z: loss(unravel(z), batch))(outputs)


def _jacobian(case, params):
    return np.asarray(_jacobian_of(case.model, params, case.batch))


def _curvature(case, params):
    """JᵀHJ with H the loss's Hessian in the outputs, both materialised."""
    jacobian = _jacobian(case, params)
    return (
        jacobian.T @ np.asarray(_hessian_of(case.model, case.loss, params, case.batch)) @ jacobian
    )


def _system(objective, params, batch, damping, scaling=None):
    model = gnlin.quadratic_model(objective, params, batch)
    system = model.system(damping, scaling)
    return system, model.gradient()


def _solved(solver, system, rhs):
    solution, _ = solver.solve(system, rhs, solver.init(rhs)[0])
    return solution.direction, solution.stats


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_that_of_the_jacobian(name, x64):
    case = _cases()[name]
    # Not of influence alone: what is held has 0, and adds nothing.
    scaling = jax.tree.map(lambda leaf: jnp.maximum(jnp.cos(5.0 * leaf) + 0.5, 0), case.params)

    @jax.jit
    def kernels(params):
        linear = gnlin.linearise(gnlin.Objective(case.model, case.loss), params, case.batch)
        return [kernel_matrix(linear.jvp, linear.vjp, params, each) for each in (None, scaling)]

    jacobian = _jacobian(case, case.params)
    inverse = np.where(_flat(scaling) > 0, 1 / np.where(_flat(scaling) > 0, _flat(scaling), 1), 0)
    for kernel, weights in zip(kernels(case.params), (np.ones_like(inverse), inverse), strict=True):
        expected = (jacobian * weights) @ jacobian.T
        np.testing.assert_allclose(kernel.matrix, expected, rtol=0, atol=1e-13 * np.trace(expected))
        assert kernel.pull_backs == case.pull_backs


@pytest.mark.parametrize("name", ["scalar", "softmax", "pytree"])
def test_solve_agrees_with_numpy(name, x64):
    """For any right-hand side, and for the gradient."""
    case = _cases()[name]
    objective, params = gnlin.Objective(case.model, case.loss), case.params
    some = jax.tree.map(lambda leaf: jnp.sin(7.0 * leaf) + 0.3, params)
    scaling = (
        jax.tree.map(lambda leaf: 1.5 + jnp.cos(5.0 * leaf), params) if name == "pytree" else None
    )

    @jax.jit
    def solve(damping):
        system, gradient = _system(objective, params, case.batch, damping, scaling)
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), some, gradient)
        return both, jax.vmap(lambda rhs: _solved(Dual(), system, rhs))(both)

    curvature = _curvature(case, params)
    for damping in (1.0, 1e-3, 1e-6):
        both, (steps, stats) = solve(damping)
        matrix = curvature + damping * np.diag(
            np.ones(len(curvature)) if scaling is None else _flat(scaling)
        )
        resolution = np.finfo(float).eps * np.linalg.norm(matrix, 2) / damping
        for index in range(2):
            taken = [jax.tree.map(itemgetter(index), each) for each in (both, steps)]
            rhs, step = map(_flat, taken)
            residual = np.linalg.norm(rhs - matrix @ step) / np.linalg.norm(rhs)
            assert residual < np.finfo(float).eps ** 0.5
            assert abs(residual - stats["dual/residual"][index]) < 20 * resolution
            assert stats["dual/converged"][index]
            expected = np.linalg.solve(matrix, rhs)
            assert np.linalg.norm(step - expected) < (
                1e-4 if damping == 1e-6 else 1e-8
            ) * np.linalg.norm(expected)


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    draw = np.random.default_rng(0)
    params = [
        (draw.standard_normal((i, o)) / np.sqrt(i), np.zeros(o))
        for i, o in ((64, 16), (16, 16), (16, 10))
    ]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def model(params, batch):
        h = batch["x"]
        for index, (w, b) in enumerate(params):
            h = (jnp.tanh(h) if index else h) @ w + b[None, :]
        return h

    def loss(outputs, batch):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()

    batch = {"x": jnp.asarray(x[:12] / 8 - 1, jnp.float32), "y": jnp.asarray(y[:12], jnp.int32)}
    return gnlin.Objective(model, third_party(loss)), params, batch


def digits_curvature(objective, params, batch):
    """JᵀHJ, H being that of the softmax, in NumPy and float64 but for J."""
    jacobian = np.asarray(
        jax.jit(jax.jacrev(oracles.raveled(objective, params, batch)[2]))(ravel_pytree(params)[0])
    )
    outputs = np.asarray(objective.outputs_and_aux(params, batch)[0], np.float64)
    p = np.exp(outputs - outputs.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    weighted = p[:, :, None] * (jacobian - np.einsum("nc,ncp->np", p, jacobian)[:, None])
    size = jacobian.shape[-1]
    return jacobian.reshape(-1, size).T @ weighted.reshape(-1, size) / len(p)


def test_float32_on_digits():
    objective, params, batch = digits()
    curvature = digits_curvature(objective, params, batch)

    @jax.jit
    def solve(damping, rhs):
        system, gradient = _system(objective, params, batch, damping)
        rhs = jax.tree.map(
            lambda given, own: jnp.where(jnp.isnan(given), own, given), rhs, gradient
        )
        return rhs, *_solved(Dual(), system, rhs)

    for damping in (1.0, 1e-2, 1e-4, 1e-6):
        # What float32 can know of this system, with the trace for the norm.
        resolution = np.finfo(np.float32).eps * np.trace(curvature) / damping
        for rhs in (
            jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params),
            jax.tree.map(jnp.cos, params),
        ):
            b, step, stats = solve(damping, rhs)
            residual = np.linalg.norm(_flat(b) - curvature @ _flat(step) - damping * _flat(step))
            assert residual < max(5e-4, resolution) * np.linalg.norm(_flat(b))
            assert stats["dual/converged"] == (
                stats["dual/residual"] <= np.finfo(np.float32).eps ** 0.5
            )
            assert stats["dual/pull_backs"] == 10


def _as(dtype, case):
    return case._replace(
        params=gnlin.tree.cast(case.params, dtype), batch=gnlin.tree.cast(case.batch, dtype)
    )


def test_bfloat16_parameters_have_steps_in_bfloat16():
    wide = _as(jnp.float32, _cases()["softmax"])
    case = _as(jnp.bfloat16, wide)
    objective = gnlin.Objective(case.model, case.loss)
    step, _ = jax.jit(lambda p: _solved(Dual(), *_system(objective, p, case.batch, 1.0)))(
        case.params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(step)} == {jnp.bfloat16.dtype}
    matrix = _curvature(wide, wide.params) + np.eye(_flat(step).size)
    expected = np.linalg.solve(
        matrix, _flat(jax.jit(jax.grad(objective.value))(wide.params, wide.batch))
    )
    error = np.linalg.norm(_flat(step).astype(np.float32) - expected) / np.linalg.norm(expected)
    assert (
        error < tolerance(jnp.bfloat16, 16)["rtol"]
    )  # outputs, cotangents and gradients are rounded, too


def test_spring_is_damped_towards_the_last_solution(x64):
    case = _cases()["softmax"]
    momentum, objective, rate, damping = 0.9, gnlin.Objective(case.model, case.loss), 0.1, 1e-2
    scale = jnp.linspace(0.5, 1.5, 4)
    batches = {"x": jnp.stack([case.batch["x"] * s for s in scale])}
    tx = full_steps(objective, damping, rate, solver=Dual(momentum=momentum))

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), updates

    (_, state), updates = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), batches))(
        case.params
    )
    flat, unravel = ravel_pytree(case.params)
    last, gradient_of = np.zeros(flat.size), jax.jit(jax.grad(objective.value))
    for index, s in enumerate(scale):
        moved = case._replace(batch={"x": case.batch["x"] * s})
        gradient = _flat(gradient_of(unravel(flat), moved.batch))
        # argmin_x  ½ xᵀGx − gᵀx + λ/2 ‖x − μ p‖²
        matrix = _curvature(moved, unravel(flat)) + damping * np.eye(flat.size)
        last = np.linalg.solve(matrix, gradient + damping * momentum * last)
        taken = _flat(jax.tree.map(lambda leaf: leaf[index], updates))  # noqa: B023
        np.testing.assert_allclose(taken, -rate * last, rtol=0, atol=1e-9 * np.linalg.norm(last))
        flat = flat + taken
    assert not jax.tree.leaves(Dual().init(case.params)[0])
    assert gnlin.metrics(state)["dual/converged"]


def test_batches_of_solves_and_right_hand_sides_without_a_solution(x64):
    """`vmap` over systems; where no solution can be had the step is zero, and the last solution is
    kept.
    """
    case = _cases()["softmax"]
    objective, solver = gnlin.Objective(case.model, case.loss), Dual(momentum=0.5)

    def solve(damping, factor, share, other, last):
        system, gradient = _system(objective, case.params, {"x": case.batch["x"] * factor}, damping)
        rhs = jax.tree.map(lambda g, p: share * g + other * jnp.cos(p), gradient, case.params)
        state = DualState(jax.tree.map(lambda p: last * p, case.params), ())
        solution, state = solver.solve(system, rhs, state)
        return _raveled(solution.direction), _raveled(state.last), solution.stats

    lanes = [
        # λ, factor of the data, share of the gradient and of another vector in b, last solution
        (1.0, 1.0, 1.0, 0.0, 1.0),
        (0.1, 1.0, 1.0, 0.0, 1.0),
        (0.1, 1.0, 0.0, 0.0, 0.0),  # b is zero
        (0.1, jnp.nan, 1.0, 0.0, 1.0),
        (0.0, 1.0, 0.0, 1.0, 1.0),  # no step explains b
        (1e-30, 1.0, 0.0, 1.0, 1.0),
    ]
    steps, lasts, stats = jax.jit(jax.vmap(solve))(*jnp.asarray(lanes).T)
    gradient = _flat(jax.jit(jax.grad(objective.value))(case.params, case.batch))
    curvature, before = _curvature(case, case.params), _flat(case.params)
    for index in range(2):
        matrix = curvature + lanes[index][0] * np.eye(gradient.size)
        expected = np.linalg.solve(matrix, gradient + lanes[index][0] * 0.5 * before)
        np.testing.assert_allclose(steps[index], expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(steps[:3], lasts[:3])
    assert not np.any(steps[2:])
    np.testing.assert_array_equal(lasts[3:], np.stack([before] * 3))
    assert stats["dual/converged"].tolist() == [True] * 3 + [False] * 3
    np.testing.assert_array_equal(stats["dual/residual"][2:], [0, 1, 1, 1])


def test_a_small_budget_changes_nothing(x64):
    case = _cases()["pooled"]
    linear = gnlin.linearise(gnlin.Objective(case.model, case.loss), case.params, case.batch)
    jacobian = _jacobian(case, case.params)
    for budget, pull_backs in ((250, 4 + 4 * N), (2, 4 * N)):
        kernel = jax.jit(
            lambda budget=budget: kernel_matrix(linear.jvp, linear.vjp, case.params, budget=budget)
        )()
        np.testing.assert_allclose(kernel.matrix, jacobian @ jacobian.T, rtol=1e-11, atol=1e-11)
        assert kernel.pull_backs == pull_backs


# Too many outputs.


def wide_problem():
    objective = gnlin.Objective(lambda p, batch: batch @ p, lambda z, batch: 0.5 * jnp.sum(z**2))
    return objective, jnp.ones((3, 100)), jnp.ones((700, 3))


def test_too_many_outputs_are_refused_before_anything_is_computed():
    objective, params, batch = wide_problem()
    tx = gnlin.scale_by_gauss_newton(objective, 0.1, solver=Dual())
    with pytest.raises(
        ValueError,
        match=r"`max_outputs` is 4096, but the batch has 70000 outputs.*110 GiB.*gnlin\.CG",
    ):
        jax.eval_shape(lambda p, b: tx.update(None, tx.init(p), p, batch=b), params, batch)


def test_another_solver_for_too_many_outputs():
    objective, params, batch = wide_problem()
    batch = batch[:60]
    cg = gnlin.CG(max_iterations=4)
    tx = gnlin.scale_by_gauss_newton(objective, 0.1, solver=Dual(otherwise=cg, max_outputs=100))
    alone = gnlin.scale_by_gauss_newton(objective, 0.1, solver=cg)

    def updated(tx, batch):
        return tx.update(None, tx.init(params), params, batch=batch)

    step, state = jax.jit(lambda: updated(tx, batch))()
    np.testing.assert_array_equal(step, jax.jit(lambda: updated(alone, batch)[0])())
    assert gnlin.metrics(state)["cg/converged"]
    for shape in (
        jax.eval_shape(lambda: updated(tx, batch[:1])[1]),
        jax.eval_shape(lambda: tx.init(params)),
    ):
        assert shape == jax.eval_shape(lambda: state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"`momentum` must lie in \[0, 1\); got 1.0"),
        ({"momentum": -0.1}, ValueError, r"`momentum` must lie in \[0, 1\); got -0.1"),
        ({"momentum": float("nan")}, ValueError, r"`momentum` must lie in \[0, 1\); got nan"),
        ({"momentum": True}, ValueError, r"`momentum` must lie in \[0, 1\); got True"),
        ({"max_outputs": 0}, ValueError, "`max_outputs` must be an integer of at least 1; got 0"),
        (
            {"max_outputs": 2.0},
            ValueError,
            "`max_outputs` must be an integer of at least 1; got 2.0",
        ),
        ({"otherwise": gnlin.CG}, TypeError, "`otherwise` must be a record, not its class"),
        ({"otherwise": "cg"}, TypeError, "`otherwise` must be a solver record .* got 'cg'"),
        ({"jitter": 1e-6}, TypeError, "unexpected keyword argument 'jitter'"),
    ],
    ids=str,
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        Dual(**options)

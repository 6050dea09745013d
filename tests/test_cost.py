"""Work in compiled floating-point operations, relative to one value-and-gradient: no clock
involved.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import gnlin


def _flops(function, *args) -> float:
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def _perceptron():
    sizes = (64, 128, 64, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    params = [
        jax.random.normal(k, (i, o)) / i**0.5
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def model(params, batch):
        hidden = batch["x"]
        for weights in params[:-1]:
            hidden = jnp.tanh(hidden @ weights)
        return hidden @ params[-1]

    return model, params, jax.random.normal(jax.random.key(1), (256, 64))


def _convolutional():
    keys = jax.random.split(jax.random.key(0), 3)
    params = [
        jax.random.normal(keys[0], (3, 3, 8, 16)) / 9,
        jax.random.normal(keys[1], (3, 3, 16, 16)) / 12,
        jax.random.normal(keys[2], (16, 10)) / 4,
    ]

    def model(params, batch):
        hidden = batch["x"]
        for kernel in params[:-1]:
            hidden = jax.lax.conv_general_dilated(
                hidden, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            hidden = jnp.tanh(hidden)
        return jnp.mean(hidden, axis=(1, 2)) @ params[-1]

    return model, params, jax.random.normal(jax.random.key(1), (16, 12, 12, 8))


@pytest.fixture(params=[_perceptron, _convolutional], ids=["perceptron", "convolutional"])
def problem(request):
    model, params, x = request.param()
    labels = jax.nn.one_hot(jnp.arange(x.shape[0]) % 10, 10)

    def loss(outputs, batch):
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(outputs) * batch["y"], axis=-1))

    objective, batch = gnlin.Objective(model, loss), {"x": x, "y": labels}
    return objective, params, batch, _flops(objective.value_and_grad, params, batch)


def _step(tx, with_gradient, objective):
    def step(params, state, batch):
        grads = objective.value_and_grad(params, batch)[1] if with_gradient else None
        return tx.update(grads, state, params, batch=batch)

    return step


def _step_flops(tx, problem, with_gradient=False):
    objective, params, batch, _ = problem
    return _flops(_step(tx, with_gradient, objective), params, tx.init(params), batch)


@pytest.mark.parametrize("loss_model", ["exact", "quadratic"])
@pytest.mark.parametrize(("period", "most"), [(1, 1.02), (2, 1.70), (64, 1.70), (None, 1.70)])
def test_a_linearised_step(problem, period, most, loss_model):
    tx = gnlin.linearise_gradients(problem[0], period, loss_model=loss_model)
    assert _step_flops(tx, problem) <= most * problem[3]


def test_a_look_at_the_gap(problem):
    tx = gnlin.linearise_gradients(problem[0], gnlin.RelativeGap(0.1))
    assert _step_flops(tx, problem) <= 2.05 * problem[3]


@pytest.mark.parametrize("exact", [(0,), (0, 2), (2,), (0, 1, 2)], ids=str)
def test_a_partly_linearised_step(problem, exact):
    layers = gnlin.LayerPeriods({True: 1, False: 16}, [index in exact for index in range(3)])
    most = 1.02 if len(exact) == 3 else 1.9
    assert _step_flops(gnlin.linearise_gradients(problem[0], layers), problem) <= most * problem[3]


def test_drift_costs_a_kernel_where_it_is_looked_at(problem):
    """XLA counts the dearer of two branches."""
    objective, params, batch, gradient = problem
    probe = jax.tree.map(lambda leaf: leaf[:8], batch)
    kernel = _flops(
        lambda params: gnlin.kernel.empirical_ntk(objective, params, probe, pairs="trace"), params
    )
    watched = _step_flops(
        gnlin.measure_kernel_drift(optax.sgd(0.1), objective, probe, 10), problem, True
    )
    assert watched <= 1.01 * gradient + 1.01 * kernel + 1e4


def test_an_inner_step_of_prox_linear(problem):
    def total(steps):
        # XLA counts the body of a loop once: unroll it by hand, by the public value and gradient.
        objective, params, batch, _ = problem

        def run(params, batch):
            linear = gnlin.linearise(objective, params, batch)
            offset = jax.tree.map(jnp.zeros_like, params)
            for _ in range(steps):
                cotangent = jax.grad(objective.loss_of)(
                    jax.tree.map(jnp.add, linear.outputs, linear.jvp(offset)), batch
                )
                offset = jax.tree.map(lambda o, g: o - 0.1 * g, offset, linear.vjp(cotangent))
            return offset

        return _flops(run, params, batch)

    assert total(3) - total(2) <= 1.40 * problem[3]
    # The transform itself has the body of its loop in it once, beside the linearisation, a forward
    # pass.
    forward = _flops(
        lambda params, batch: gnlin.linearise(problem[0], params, batch).outputs, *problem[1:3]
    )
    once = _step_flops(gnlin.prox_linear(optax.sgd(0.1), problem[0], 50), problem)
    assert once - forward <= 1.40 * problem[3]


def test_an_iteration_of_conjugate_gradients(problem):
    objective, params, batch, gradient = problem

    def products(params, batch, count):
        product, vector = gnlin.ggn_vector_product(objective, params, batch), params
        for _ in range(count):
            vector = product(vector)
        return vector

    two, three = (_flops(lambda p, b, n=n: products(p, b, n), params, batch) for n in (2, 3))
    assert three - two <= 1.40 * gradient
    # A whole step: the gradient, and the body of the CG loop, which XLA counts once.
    once = _step_flops(
        gnlin.scale_by_gauss_newton(objective, 1.0, solver=gnlin.CG(max_iterations=30)), problem
    )
    assert once <= (1.40 + 1.05) * gradient


@pytest.mark.parametrize(
    "make",
    [
        lambda objective: gnlin.linearise_gradients(objective, 16),
        lambda objective: gnlin.prox_linear(optax.sgd(0.1), objective, 4),
        lambda objective: gnlin.levenberg_marquardt(objective),
    ],
    ids=["linearise_gradients", "prox_linear", "levenberg_marquardt"],
)
def test_an_ignored_gradient_costs_nothing(problem, make):
    tx = make(problem[0])
    assert _step_flops(tx, problem, with_gradient=True) <= 1.001 * _step_flops(tx, problem)

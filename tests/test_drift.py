"""Kernel drift inside training against kernels computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from problems import third_party

import gnlin


def model(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]) @ params["out"]


def loss(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


OBJECTIVE = gnlin.Objective(model, loss)
SGD = third_party(optax.sgd(0.5))


def start():
    return {"in": oracles.normal(3, 6, seed=1), "out": oracles.normal(6, 2, seed=2)}


def batch(seed=3, examples=8):
    return {
        "x": oracles.normal(examples, 3, seed=seed),
        "y": oracles.normal(examples, 2, seed=seed + 1),
    }


def trace_kernel(params, data):
    """By forward mode."""
    columns = [
        jax.jacfwd(lambda leaf, name=name: model({**params, name: leaf}, data))(params[name])
        for name in params
    ]
    rows = np.concatenate(
        [np.asarray(each).reshape(*each.shape[:2], -1) for each in columns], axis=-1
    )
    return np.einsum("ncp,mcp->nm", rows, rows)


def by_hand(kernel, reference):
    def cosine(a, b):
        return np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2))

    centre = np.eye(len(kernel)) - 1 / len(kernel)
    return {
        "kernel/alignment": cosine(kernel, reference),
        "kernel/centred_alignment": cosine(centre @ kernel @ centre, centre @ reference @ centre),
        "kernel/distance": np.linalg.norm(kernel - reference) / np.linalg.norm(reference),
    }


def trained(tx, steps):
    """``(parameters that each update was given, state after it)``."""
    params, visited = start(), []
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(OBJECTIVE.value)(params, batch()), state, params, batch=batch()
        )
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        given = params
        params, state = step(params, state)
        visited.append((given, state))
    return visited


def test_drift_is_measured_every_so_often(x64):
    probe = batch(seed=7, examples=5)
    path = trained(gnlin.measure_kernel_drift(SGD, OBJECTIVE, probe, every=3), 8)
    reference, plain, measured = trace_kernel(start(), probe), trained(SGD, 8), start()
    for count, ((given, state), (expected, _)) in enumerate(zip(path, plain, strict=True)):
        for name in given:
            np.testing.assert_array_equal(given[name], expected[name])
        measured = given if count % 3 == 0 else measured
        found = gnlin.metrics(state)
        assert found["kernel/age"] == count % 3
        for name, value in by_hand(trace_kernel(measured, probe), reference).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10)
    assert found["kernel/alignment"] < 0.99


@pytest.mark.parametrize("period", [None, 4])
def test_the_kernel_is_that_of_the_model_that_is_trained(period, x64):
    """The kernel of linearised training stands still; with an anchor that moves, it moves."""
    probe = batch(seed=7, examples=5)
    inner = optax.chain(gnlin.linearise_gradients(OBJECTIVE, period), SGD)
    path = trained(gnlin.measure_kernel_drift(inner, OBJECTIVE, probe, every=1), 7)
    for count, (_, state) in enumerate(path):
        found = gnlin.metrics(state)
        anchor = path[count - count % period if period else 0][0]
        expected = by_hand(trace_kernel(anchor, probe), trace_kernel(start(), probe))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10)
    assert (found["kernel/alignment"] == pytest.approx(1, abs=1e-12)) is (period is None)


def test_a_reference_of_ones_own(x64):
    probe, elsewhere = batch(seed=7, examples=5), jax.tree.map(jnp.sin, start())
    reference = gnlin.kernel.empirical_ntk(OBJECTIVE, elsewhere, probe, pairs="trace")
    tx = gnlin.measure_kernel_drift(SGD, OBJECTIVE, probe, every=10, reference=reference)
    found = gnlin.metrics(trained(tx, 1)[0][1])
    for name, value in by_hand(
        trace_kernel(start(), probe), trace_kernel(elsewhere, probe)
    ).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10)


def test_bad_input():
    probe = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), batch())
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start())

    def build(inner=SGD, objective=OBJECTIVE, probe=probe, every=1, **options):
        return gnlin.measure_kernel_drift(inner, objective, probe, every, **options)

    with pytest.raises(TypeError, match=r"`inner` must be an optax.GradientTransformation"):
        build(inner=0.1)
    with pytest.raises(TypeError, match=r"`objective` must be a gnlin.Objective"):
        build(objective=model)
    with pytest.raises(ValueError, match=r"`probe` is missing"):
        build(probe=None)
    with pytest.raises(ValueError, match=r"`every` must be an integer of at least 1; got 0"):
        build(every=0)
    with pytest.raises(ValueError, match=r"`every` must be an integer of at least 1; got 2.0"):
        build(every=2.0)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'period'"):
        build(period=2)
    with pytest.raises(
        ValueError, match=r"`reference` must be a kernel between the 8 examples .* got \(5, 5\)"
    ):
        build(reference=jnp.eye(5)).init(params)
    # At init, and not in the middle of training.
    with pytest.raises(ValueError, match=r"`model\(params, batch\)` failed: KeyError: 'x'"):
        build(probe={"images": probe["x"]}).init(params)
    with pytest.raises(ValueError, match=r"`probe` needs an objective without data of its own"):
        build(objective=OBJECTIVE.bind(batch()))
    tx = build()
    with pytest.raises(ValueError, match=r"`params` is missing"):
        tx.update(params, tx.init(params))
    masked = optax.masked(tx, {"in": True, "out": False})
    with pytest.raises(ValueError, match=r"`params` has optax.MaskedNode holes"):
        masked.update(params, masked.init(params), params)
    bound = optax.masked(
        build(objective=OBJECTIVE.bind(probe), probe=None), {"in": True, "out": False}
    )
    assert bound.init(params).inner_state.reference.shape == (8, 8)
    nothing = optax.masked(build(), {"in": False, "out": False})
    _, state = nothing.update(params, nothing.init(params), params, all_params=params)
    assert state.inner_state.metrics["kernel/distance"] == 0
    uneven = optax.masked(build(probe={**probe, "mean": jnp.zeros(3)}), {"in": True, "out": False})
    with pytest.raises(
        ValueError, match=r"`reference` is needed where parameters are masked and the leaves"
    ):
        uneven.init(params)
    wrong = optax.masked(build(reference=jnp.eye(5)), {"in": True, "out": False})
    with pytest.raises(
        ValueError, match=r"`reference` must be a kernel between the 8 examples .* got \(5, 5\)"
    ):
        wrong.update(params, wrong.init(params), params, all_params=params)

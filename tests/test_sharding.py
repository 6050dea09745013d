"""A batch over eight devices gives the result of one device, and so do parameters.

Kernels, gaps, layers and spectral norms are compared with automatic axes. With explicit ones, which
`jax.make_mesh` makes, all optimisers are.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

PROGRAM = """
import jax, jax.numpy as jnp, optax, gnlin
from jax.sharding import Mesh, NamedSharding, PartitionSpec

def model(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]) @ params["out"]

def loss(outputs, batch):
    squares = (outputs - batch["y"]) ** 2
    return jnp.sum(batch["weights"][:, None] * squares) / jnp.sum(batch["weights"])

objective = gnlin.Objective(model, loss)
keys = jax.random.split(jax.random.key(0), 5)
params = {
    "in": jax.random.normal(keys[0], (8, 16)) / 3, "out": jax.random.normal(keys[1], (16, 2)) / 4
}
batch = {"x": jax.random.normal(keys[2], (64, 8)), "y": jax.random.normal(keys[3], (64, 2)),
         "weights": jax.random.uniform(keys[4], (64,))}
probe = jax.tree.map(lambda leaf: leaf[:16], batch)
layers = gnlin.LayerPeriods({"in": 2, "out": 1}, {"in": "in", "out": "out"})
gap = gnlin.iterative_linearisation(optax.adam(0.05), objective, gnlin.RelativeGap(0.2, patience=1))
rate = optax.scale_by_learning_rate(0.1)
transforms = {
    "spectral": optax.chain(gnlin.width.scale_by_spectral_condition(), rate),
    "maximal update": optax.chain(optax.sgd(0.01), gnlin.width.scale_by_maximal_update_sgd()),
    "layers": optax.chain(gnlin.linearise_gradients(objective, layers), rate),
    "drift and gap": gnlin.measure_kernel_drift(gap, objective, probe, every=2),
}
by_row = NamedSharding(Mesh(jax.devices(), "rows"), PartitionSpec("rows"))
assert jax.device_count() == 8
for name, tx in transforms.items():
    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(objective.value)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    def run(batch):
        carry = params, tx.init(params)
        for _ in range(6):
            carry = step(*carry, batch)
        return jax.device_get((carry[0], gnlin.metrics(carry[1])))

    one, eight = run(batch), run(jax.device_put(batch, by_row))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert abs(a - b).max() <= 2e-5 * max(abs(a).max(), 1), (name, a, b)

both = batch, jax.device_put(batch, by_row)
for options in ({"pairs": "trace"}, {"pairs": "full", "max_bytes": 120_000}):  # whole, in parts
    one, eight = jax.device_get(
        [gnlin.kernel.empirical_ntk(objective, params, each, **options) for each in both])
    assert abs(one - eight).max() <= 1e-5 * abs(one).max()
"""


EXPLICIT = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np, optax, gnlin
from jax.sharding import NamedSharding, PartitionSpec as P

keys = jax.random.split(jax.random.key(0), 5)
params = {"in": jax.random.normal(keys[0], (3, 8)), "bias": jnp.zeros(8),
          "out": jax.random.normal(keys[1], (8, 2)), "table": jax.random.normal(keys[4], (8, 3))}
batch = {"x": jax.random.normal(keys[2], (16, 3)), "y": jax.random.normal(keys[3], (16, 2)),
         "token": jnp.arange(16) % 8}
whole = {name: P() for name in params}
columns = {"in": P(None, "d"), "bias": P("d"), "out": P("d", None), "table": P()}

def model(of_hidden):
    # Between sharded parameters the user says where results lie, as without curvature.
    def outputs(p, b):
        x = b["x"] + p["table"].at[b["token"]].get(out_sharding=of_hidden[0])
        hidden = jnp.tanh(jnp.matmul(x, p["in"], out_sharding=of_hidden[1]) + p["bias"])
        return jnp.matmul(hidden, p["out"], out_sharding=of_hidden[2])
    return outputs

def loss(outputs, batch):
    return jnp.mean(jnp.square(jnp.sin(outputs) - batch["y"]))

def variants(objective):
    g, K = gnlin, gnlin.Kronecker
    cg = lambda **options: g.CG(max_iterations=4, rtol=0.0, **options)
    labels = {"in": "a", "bias": "a", "out": "b", "table": "b"}
    solve = lambda solver: optax.chain(
        g.scale_by_gauss_newton(objective, 0.3, solver=solver), optax.scale(-1.0))
    return {
        "default": g.gauss_newton(objective),
        "low rank": g.gauss_newton(objective, solver=K(rank=1, refresh=5)),
        "eigenbasis": g.gauss_newton(objective, solver=g.Eigenbasis()),
        "CG, Kronecker": solve(cg(preconditioner=K())),
        "CG, Nystrom": solve(cg(preconditioner=g.Nystrom(3))),
        "CG, Jacobi": solve(cg(preconditioner=g.Jacobi(probes=2))),
        "dense": solve(g.Dense()),
        "dual": solve(g.Dual()),
        "blocks": solve(g.Blocks(g.Dense(), labels)),
        "LM": g.levenberg_marquardt(objective, solver=cg()),
        "radius": g.levenberg_marquardt(
            objective, damping=g.TrustRegion(1.0), scaling="marquardt", solver=g.Dense()),
        "linearised": optax.chain(g.linearise_gradients(objective, 2), optax.scale(-0.1)),
        "prox": g.prox_linear(optax.sgd(0.1), objective, 2),
        "drift": g.measure_kernel_drift(optax.adam(0.1), objective, batch, every=2),
    }

def run(name, of_hidden, params, batch):
    objective = gnlin.Objective(model(of_hidden), loss)
    tx = variants(objective)[name]

    @jax.jit
    def step(params, state, batch):
        gradient = objective.value_and_grad(params, batch)[1]
        updates, state = tx.update(gradient, state, params, batch=batch)
        return jax.tree.map(jnp.add, params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state, batch)
    return params

mesh = jax.make_mesh((4,), ("d",))
assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
for name in variants(gnlin.Objective(model((None,) * 3), loss)):
    one = run(name, (None,) * 3, params, batch)
    for specs, of_batch, of_hidden in (
        # With an entry for each axis: under `vmap` JAX 0.10 stops where one is left out.
        (whole, P("d"), (P("d", None),) * 3),
        (columns, P(), (P(None, None), P(None, "d"), P(None, None))),
    ):
        with jax.set_mesh(mesh):
            put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
            sharded = {key: put(leaf, specs[key]) for key, leaf in params.items()}
            found = run(name, of_hidden, sharded, put(batch, of_batch))
        for key, leaf in found.items():
            assert leaf.sharding.is_equivalent_to(sharded[key].sharding, leaf.ndim), (name, key)
            error = np.max(np.abs(np.asarray(leaf) - np.asarray(one[key])))
            assert error < 1e-9, (name, specs[key], key, error)

# Without jit, and without a mesh around.
put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
objective = gnlin.Objective(
    lambda p, b: jnp.tanh(b["x"] @ p["in"] + p["bias"]) @ p["out"] + p["table"][0, :2], loss)
everywhere, rows = put(params, P()), put(batch, P("d"))
for tx in variants(objective)["linearised"], variants(objective)["default"]:
    one = tx.update(None, tx.init(params), params, batch=batch)[0]
    with jax.set_mesh(mesh):
        found = tx.update(None, tx.init(everywhere), everywhere, batch=rows)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, one)
try:
    jax.jit(tx.update)(None, tx.init(everywhere), everywhere, batch=rows)
except ValueError as error:
    assert "inside `with jax.set_mesh(mesh):`" in str(error), error
else:
    raise AssertionError("a mesh is wanted")

with jax.set_mesh(mesh):
    for options in ({"pairs": "trace"}, {"pairs": "full"}):
        one = gnlin.kernel.empirical_ntk(
            gnlin.Objective(model((None,) * 3), loss), params, batch, **options)
        found = jax.jit(lambda p, b: gnlin.kernel.empirical_ntk(
            gnlin.Objective(model((P("d", None),) * 3), loss), p, b, **options)
        )(put(params, P()), put(batch, P("d")))
        np.testing.assert_allclose(found, one, rtol=1e-9)
"""


def test_a_batch_on_eight_devices():
    run(PROGRAM, devices=8)


@pytest.mark.skipif(not hasattr(jax.sharding, "auto_axes"), reason="JAX has no explicit axes yet")
def test_explicit_axes():
    run(EXPLICIT, devices=4)


def run(program, devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr

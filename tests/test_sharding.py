"""A batch over eight devices gives the result of one device.

Kernels, gaps, layers and spectral norms are compared.
"""

import os
import subprocess
import sys
from pathlib import Path

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


def test_a_batch_on_eight_devices():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr

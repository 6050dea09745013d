"""One training loop, four optimisers, on scikit-learn's handwritten digits.

python examples/quickstart.py
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import gnlin

STEPS, BATCH_SIZE, HELD_OUT = 150, 256, 360


def model(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]) @ params["out"]  # logits, (N, 10)


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def load():
    """``(training, held_out)``, each a batch; the split is the same for every optimiser."""
    images, labels = load_digits(return_X_y=True)
    order = jax.random.permutation(jax.random.key(0), len(labels))
    data = {"x": jnp.asarray(images / 16, jnp.float32)[order], "y": jnp.asarray(labels)[order]}
    return jax.tree.map(lambda leaf: leaf[HELD_OUT:], data), jax.tree.map(
        lambda leaf: leaf[:HELD_OUT], data
    )


def train(objective, tx, data):
    """The parameters and the optimiser's state after `STEPS` updates, compiled as one scan."""
    params = {"in": jax.random.normal(jax.random.key(1), (64, 32)) / 8, "out": jnp.zeros((32, 10))}

    def step(carry, key):
        params, opt_state = carry
        batch = jax.tree.map(lambda leaf: jax.random.choice(key, leaf, (BATCH_SIZE,)), data)
        grads = jax.grad(objective.value)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(2), STEPS)
    carry, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, tx.init(params)))
    return params, *carry


def main():
    training, held_out = load()
    objective = gnlin.Objective(model, loss)
    optimisers = {
        "Adam": optax.with_extra_args_support(optax.adam(1e-2)),
        "iterative linearisation": optax.chain(
            gnlin.linearise_gradients(objective, period=16), optax.adam(1e-2)
        ),
        "damped Gauss-Newton": gnlin.gauss_newton(1.0, objective, damping=0.1),
        "Levenberg-Marquardt": gnlin.levenberg_marquardt(objective),
    }
    print(f"{'optimiser':<26}{'first loss':>12}{'last loss':>12}{'held out':>12}")
    for name, tx in optimisers.items():
        start, params, opt_state = train(objective, tx, training)
        # What is trained is the model linearised at the anchor, where there is one.
        logits = gnlin.predict(objective, opt_state, params, held_out)
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == held_out["y"])
        first, last = (objective.value(p, training) for p in (start, params))
        print(f"{name:<26}{first:>12.4f}{last:>12.4f}{accuracy:>12.3f}")


if __name__ == "__main__":
    main()

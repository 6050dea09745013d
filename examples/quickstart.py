"""Train with four optimisers in one loop, on scikit-learn's handwritten digits.

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
    """Return ``(training, held_out)``, each a batch. The split is the same for every optimiser."""
    images, labels = load_digits(return_X_y=True)
    order = jax.random.permutation(jax.random.key(0), len(labels))
    data = {"x": jnp.asarray(images / 16, jnp.float32)[order], "y": jnp.asarray(labels)[order]}
    training = jax.tree.map(lambda leaf: leaf[HELD_OUT:], data)
    held_out = jax.tree.map(lambda leaf: leaf[:HELD_OUT], data)
    return training, held_out


def train(objective, tx, data):
    """Make `STEPS` updates in one scan; return ``(first parameters, last parameters, state)``."""
    start = {"in": jax.random.normal(jax.random.key(1), (64, 32)) / 8, "out": jnp.zeros((32, 10))}

    def step(training, key):
        params, opt_state = training
        batch = jax.tree.map(lambda leaf: jax.random.choice(key, leaf, (BATCH_SIZE,)), data)
        grads = jax.grad(objective.value)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(2), STEPS)
    run = jax.jit(lambda training: jax.lax.scan(step, training, keys))
    (params, opt_state), _ = run((start, tx.init(start)))
    return start, params, opt_state


def main():
    training, held_out = load()
    objective = gnlin.Objective(model, loss)
    optimisers = {
        "Adam": optax.with_extra_args_support(optax.adam(1e-2)),
        "iterative linearisation": optax.chain(
            gnlin.linearise_gradients(objective, period=16), optax.adam(1e-2)
        ),
        "damped Gauss-Newton": optax.chain(
            gnlin.scale_by_gauss_newton(objective, damping=0.1), optax.scale_by_learning_rate(1.0)
        ),
        "Levenberg-Marquardt": gnlin.levenberg_marquardt(objective),
    }
    print(f"{'optimiser':<26}{'first loss':>12}{'last loss':>12}{'held out':>12}")
    for name, tx in optimisers.items():
        start, params, opt_state = train(objective, tx, training)
        # Where there is an anchor, the trained model is the one linearised there.
        logits = gnlin.predict(objective, opt_state, params, held_out)
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == held_out["y"])
        first, last = (objective.value(p, training) for p in (start, params))
        print(f"{name:<26}{first:>12.4f}{last:>12.4f}{accuracy:>12.3f}")


if __name__ == "__main__":
    main()

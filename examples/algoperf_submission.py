"""Show the shape of an AlgoPerf submission around a gnlin transform.

    python examples/algoperf_submission.py

The benchmark (https://github.com/mlcommons/algorithmic-efficiency) calls the functions
`get_batch_size`, `init_optimizer_state`, `update_params`, `prepare_for_eval` and
`data_selection`.

`objective_of` is particular to gnlin. It takes model and loss apart. Everything else that the
model needs, such as its state and a key for dropout, travels in the batch. The model's statistics
for normalisation stand still while a gradient is taken. They move once in each step, with a
forward pass.

A stand-in for a workload shows that the functions fit together, without the benchmark installed.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gnlin


def get_batch_size(workload_name):
    return {"digits": 256}[workload_name]


def objective_of(workload):
    """Make a gnlin objective of the workload, whose own batch is under ``data``."""

    def model(params, batch):
        logits, _ = workload.model_fn(
            params,
            batch["data"],
            batch["model_state"],
            mode="train",
            rng=batch["rng"],
            update_batch_norm=False,
        )
        return logits

    def loss(logits, batch):
        data = batch["data"]
        terms = workload.loss_fn(
            label_batch=data["targets"], logits_batch=logits, mask_batch=data.get("weights")
        )
        return terms["summed"] / terms["n_valid_examples"]

    return gnlin.Objective(model, loss)


def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
    objective = objective_of(workload)
    tx = optax.chain(
        gnlin.linearise_gradients(objective, hyperparameters.period),
        optax.adam(hyperparameters.learning_rate),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        _, model_state = workload.model_fn(
            params,
            batch["data"],
            batch["model_state"],
            mode="train",
            rng=batch["rng"],
            update_batch_norm=True,
        )
        updates, opt_state = tx.update(None, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state, model_state

    return tx.init(model_params), step


def update_params(
    workload,
    current_param_container,
    current_params_types,
    model_state,
    hyperparameters,
    batch,
    loss_type,
    optimizer_state,
    eval_results,
    global_step,
    rng,
    train_state=None,
):
    opt_state, step = optimizer_state
    travelling = {"data": batch, "model_state": model_state, "rng": rng}
    params, opt_state, model_state = step(current_param_container, opt_state, travelling)
    return (opt_state, step), params, model_state


def prepare_for_eval(
    workload,
    current_param_container,
    current_params_types,
    model_state,
    hyperparameters,
    loss_type,
    optimizer_state,
    eval_results,
    global_step,
    rng,
):
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload,
    input_queue,
    optimizer_state,
    current_param_container,
    model_state,
    hyperparameters,
    global_step,
    rng,
):
    return next(input_queue)


class Digits:
    """A stand-in for a workload: handwritten digits, a small network."""

    def init_model_fn(self, rng):
        first, second = jax.random.split(rng)
        return {
            "in": jax.random.normal(first, (64, 32)) / 8,
            "out": jax.random.normal(second, (32, 10)) / 6,
        }, None

    def model_fn(self, params, batch, model_state, mode, rng, update_batch_norm):
        return jnp.tanh(batch["inputs"] @ params["in"]) @ params["out"], model_state

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_batch, label_batch)
        weights = jnp.ones_like(losses) if mask_batch is None else mask_batch
        return {"summed": (losses * weights).sum(), "n_valid_examples": weights.sum()}

    def queue(self, size):
        images, labels = load_digits(return_X_y=True)
        generator = np.random.default_rng(0)
        while True:
            chosen = generator.choice(len(labels), size, replace=False)
            yield {
                "inputs": jnp.asarray(images[chosen] / 16, jnp.float32),
                "targets": jnp.asarray(labels[chosen]),
            }


def main(steps=200):
    workload, hyperparameters = Digits(), SimpleNamespace(learning_rate=0.01, period=16)
    params, model_state = workload.init_model_fn(jax.random.key(0))
    queue = workload.queue(get_batch_size("digits"))
    state = init_optimizer_state(workload, params, model_state, hyperparameters, jax.random.key(1))
    for number in range(steps):
        rng = jax.random.fold_in(jax.random.key(2), number)
        batch = data_selection(
            workload, queue, state, params, model_state, hyperparameters, number, rng
        )
        state, params, model_state = update_params(
            workload,
            params,
            None,
            model_state,
            hyperparameters,
            batch,
            None,
            state,
            [],
            number,
            rng,
        )
    state, params, model_state = prepare_for_eval(
        workload,
        params,
        None,
        model_state,
        hyperparameters,
        None,
        state,
        [],
        steps,
        jax.random.key(3),
    )
    batch = next(queue)
    logits, _ = workload.model_fn(
        params, batch, model_state, mode="eval", rng=None, update_batch_norm=False
    )
    accuracy = float((logits.argmax(-1) == batch["targets"]).mean())
    print(f"accuracy after {steps} steps: {accuracy:.3f}")


if __name__ == "__main__":
    main()

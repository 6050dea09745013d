"""The empirical kernel (`gnlin.kernel.empirical_ntk`) against a plain contraction of the Jacobian.

    python examples/kernels.py          # time, on the digits
    python examples/kernels.py --full   # larger networks, and memory

The plain contraction is `jax.vmap` of `jax.jacrev` over the examples, its rows as one matrix, and
the products of these. Both are compiled, and take turns in one process. Ratios above 1 say that the
plain one is slower.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

import gnlin
from gnlin.compare.tasks import digits


def perceptron(params, x):
    hidden = x.reshape(len(x), -1)
    for index, (w, b) in enumerate(params):
        hidden = (jnp.tanh(hidden) if index else hidden) @ w + b
    return hidden


def init_perceptron(key, *widths):
    keys = jax.random.split(key, len(widths))
    sizes = itertools.pairwise(widths)
    return [(normal(k, size), jnp.zeros(size[1])) for k, size in zip(keys, sizes, strict=False)]


def convolutional(params, x):
    hidden = x.reshape(len(x), 8, 8, -1)
    for kernel, bias in params["kernels"]:
        numbers = jax.lax.conv_dimension_numbers(
            hidden.shape, kernel.shape, ("NHWC", "HWIO", "NHWC")
        )
        hidden = jax.nn.relu(
            jax.lax.conv_general_dilated(hidden, kernel, (1, 1), "SAME", (1, 1), (1, 1), numbers)
            + bias
        )
    return jnp.mean(hidden, axis=(1, 2)) @ params["out"]


def init_convolutional(key, *channels):
    keys = jax.random.split(key, len(channels))
    sizes = [(3, 3, *pair) for pair in itertools.pairwise(channels)]
    kernels = [(normal(k, size), jnp.zeros(size[-1])) for k, size in zip(keys, sizes, strict=False)]
    return {"kernels": kernels, "out": normal(keys[-1], (channels[-1], 10))}


def attention(params, x):
    """A transformer of two blocks that reads an image row by row."""
    hidden = x.reshape(len(x), 8, -1) @ params["in"] + params["positions"]
    for block in params["blocks"]:
        h = hidden * block["scale"] / jnp.sqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-6)
        query, key, value = (jnp.einsum("nti,ihw->nhtw", h, w) for w in block["qkv"])
        scores = jax.nn.softmax(jnp.einsum("nhtw,nhsw->nhts", query, key) / query.shape[-1] ** 0.5)
        hidden = hidden + jnp.einsum("nhts,nhsw,hwo->nto", scores, value, block["mix"])
        hidden = hidden + jax.nn.gelu(hidden @ block["up"]) @ block["down"]
    return jnp.mean(hidden, axis=1) @ params["out"]


def init_attention(key, width):
    def block(key):
        keys, heads = jax.random.split(key, 6), (4, width // 4)
        return {
            "scale": jnp.ones(width),
            "qkv": [normal(k, (width, *heads)) for k in keys[:3]],
            "mix": normal(keys[3], (*heads, width)) / 2,
            "up": normal(keys[4], (width, 4 * width)),
            "down": normal(keys[5], (4 * width, width)),
        }

    keys = jax.random.split(key, 5)
    return {
        "in": normal(keys[0], (8, width)),
        "positions": normal(keys[1], (8, width)),
        "blocks": [block(keys[2]), block(keys[3])],
        "out": normal(keys[4], (width, 10)),
    }


def recurrent(params, x):
    """One layer in a loop over the rows of an image."""

    def read(hidden, row):
        return jnp.tanh(hidden @ params["hidden"] + row @ params["in"]), None

    rows = jnp.swapaxes(x.reshape(len(x), 8, -1), 0, 1)
    hidden, _ = jax.lax.scan(read, jnp.zeros((len(x), len(params["hidden"]))), rows)
    return hidden @ params["out"]


def init_recurrent(key, width):
    keys = jax.random.split(key, 3)
    return {
        "hidden": normal(keys[0], (width, width)),
        "in": normal(keys[1], (8, width)),
        "out": normal(keys[2], (width, 10)),
    }


def normal(key, shape):
    return jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5


KEY = jax.random.key(0)
QUICK = {"perceptron 64-32-10, 16": (perceptron, init_perceptron(KEY, 64, 32, 10), 16)}
NETWORKS = {
    "perceptron 64-128-64-10": (perceptron, init_perceptron(KEY, 64, 128, 64, 10), 256),
    "convolutional 1-16-32": (convolutional, init_convolutional(KEY, 1, 16, 32), 128),
    "attention, width 32": (attention, init_attention(KEY, 32), 64),
    "recurrent, width 64": (recurrent, init_recurrent(KEY, 64), 128),
}
LARGE = {
    "perceptron 64-1024-1024-10": (perceptron, init_perceptron(KEY, 64, 1024, 1024, 10), 64),
    "convolutional 1-64-64-64": (convolutional, init_convolutional(KEY, 1, 64, 64, 64), 64),
    "attention, width 128": (attention, init_attention(KEY, 128), 64),
}
PICK = {"full": "ncmd->ncmd", "diagonal": "ncmc->cnm", "trace": "ncmc->nm"}
SUMS = {"full": "ncp,mdp->ncmd", "diagonal": "ncp,mcp->cnm", "trace": "ncp,mcp->nm"}


def plain(model, pairs):
    def kernel(params, x):
        jacobian = jax.vmap(
            lambda one: jax.jacrev(lambda params: model(params, one[None])[0])(params)
        )(x)
        rows = jnp.concatenate(
            [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobian)], axis=-1
        )
        return jnp.einsum(SUMS[pairs], rows, rows, precision="highest")

    return kernel


def ours(model, pairs, **bound):
    objective = gnlin.Objective(model, lambda z, x: jnp.sum(z**2))
    return lambda params, x: gnlin.kernel.empirical_ntk(objective, params, x, pairs=pairs, **bound)


def seconds(function, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def compare_times(networks, x, repeats):
    print(
        "| network | N | pairs | plain, ms | gnlin, ms | ratio | difference |\n" + "|---" * 7 + "|"
    )
    for name, (model, params, examples) in networks.items():
        for pairs in SUMS:
            both = [jax.jit(build(model, pairs)) for build in (plain, ours)]
            kernels = [function(params, x[:examples]) for function in both]
            difference = jnp.max(jnp.abs(kernels[0] - kernels[1])) / jnp.max(jnp.abs(kernels[0]))
            times = np.array(
                [
                    [seconds(function, params, x[:examples]) for function in both]
                    for _ in range(repeats)
                ]
            )
            old, new = np.median(times, axis=0)
            ratio = np.median(times[:, 0] / times[:, 1])
            measured = f"{1e3 * old:.1f} | {1e3 * new:.1f} | {ratio:.2f} | {difference:.0e}"
            print(f"| {name} | {examples} | {pairs} | {measured} |", flush=True)


def compare_memory(networks, examples, bounds):
    """What compiled programs need beside their arguments, by XLA's own account."""
    print("\n| network | N | pairs | bound, MiB | taken, MiB |\n" + "|---" * 5 + "|")
    for name, (model, params, _) in networks.items():
        shapes = (
            jax.eval_shape(lambda params=params: params),
            jax.ShapeDtypeStruct((examples, 64), jnp.float32),
        )
        for pairs, bound in itertools.product(SUMS, bounds):
            try:
                compiled = (
                    jax.jit(ours(model, pairs, max_bytes=bound))
                    .lower(*shapes)
                    .compile()
                    .memory_analysis()
                )
                taken = (
                    f"{(compiled.temp_size_in_bytes + compiled.output_size_in_bytes) / 2**20:.1f}"
                )
            except ValueError:
                taken = "refused"
            print(f"| {name} | {examples} | {pairs} | {bound / 2**20:.0f} | {taken} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small network")
    parser.add_argument("--full", action="store_true", help="larger networks, and memory")
    options = parser.parse_args()
    x = jnp.asarray(digits().train["x"]).reshape(-1, 64)
    compare_times(QUICK if options.quick else NETWORKS, x, 3 if options.quick else 15)
    if options.quick:
        compare_memory(QUICK, 64, [2**23])
    if options.full:
        compare_times(LARGE, x, 3)
        compare_memory(NETWORKS | LARGE, 500, [2**27, 2**28, 2**29, 2**30])
        compare_memory(
            {"perceptron 64-1024-1024-10": LARGE["perceptron 64-1024-1024-10"]},
            2000,
            [2**31, 2**32],
        )


if __name__ == "__main__":
    main()

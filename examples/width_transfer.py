"""The best learning rate as a network widens, with the spectral condition and without.

    python examples/width_transfer.py                          # widths 64 and 256, one seed: a
                                                               # minute or two
    python examples/width_transfer.py --full                   # widths 64 to 2048, three seeds:
                                                               # some twenty minutes
    python examples/width_transfer.py --quick                  # seconds
    python examples/width_transfer.py --full --figure FILE.svg # and a figure of the losses by rate

Perceptrons 64-width-width-10 with tanh learn scikit-learn's digits in mini-batches of 128, at rates
that fall linearly to zero. The rate is searched for each optimiser and width, in factors of two. A
search starts from the best rate of the width before. It ends when the best has two worse rates on
either side. Rates are compared by the loss over the training data at the end, mean over seeds.

A row shows the best rate at every width. Then it shows two losses at the widest: with its own best
rate, and with the best rate of the narrowest. SGD has momentum 0.9. Optimisers with an asterisk
start from `spectral_init`, the others from normal weights / √fan-in.
"""

import argparse
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import gnlin
from gnlin.compare.tasks import TASKS
from gnlin.compare.tasks.networks import init_perceptron

WORSE = 2  # rates on either side of the best that have to be worse


def spectral(inner):
    return lambda rate: optax.chain(
        inner, gnlin.width.scale_by_spectral_condition(), optax.scale_by_learning_rate(rate)
    )


def followed_by(optimiser, multipliers):
    return lambda rate: optax.chain(optimiser(rate), multipliers)


momentum = functools.partial(optax.sgd, momentum=0.9)

# name: (rate ↦ transform, whether it starts from `spectral_init`, rate to begin the search at)
METHODS = {
    "SGD": (momentum, False, 2.0**-4),
    "SGD *": (momentum, True, 2.0**-4),
    "SGD, multipliers *": (
        followed_by(momentum, gnlin.width.scale_by_maximal_update_sgd()),
        True,
        2.0**-3,
    ),
    "SGD, spectral *": (spectral(optax.trace(0.9)), True, 2.0**-4),
    "Adam": (optax.adam, False, 2.0**-8),
    "Adam *": (optax.adam, True, 2.0**-8),
    "Adam, multipliers *": (
        followed_by(optax.adam, gnlin.width.scale_by_maximal_update_adam()),
        True,
        2.0**-2,
    ),
    "Adam, spectral *": (spectral(optax.scale_by_adam()), True, 2.0**-4),
}


def start(key, width: int, by_condition: bool):
    """Initial parameters; `by_condition` draws the weights with `spectral_init`."""
    params = init_perceptron(key, (64, width, width, 10))
    if by_condition:
        for layer, each in zip(params, jax.random.split(key, len(params)), strict=True):
            layer["w"] = gnlin.width.spectral_init(each, layer["w"].shape)
    return params


class Search:
    """Losses by rate of one optimiser at one width; each rate is run once."""

    def __init__(self, method: str, width: int, steps: int, seeds: int):
        build, by_condition, _ = METHODS[method]
        task = TASKS["digits"]()
        train = jax.tree.map(jnp.asarray, task.train)
        self.found: dict[float, float] = {}

        @jax.jit
        def run(rate, key, order):
            tx = build(optax.linear_schedule(rate, 0.0, steps))

            def step(carry, rows):
                params, state = carry
                batch = jax.tree.map(lambda leaf: leaf[rows], train)
                grads = jax.grad(task.objective.value)(params, batch)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            params = start(key, width, by_condition)
            (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), order)
            return task.objective.value(params, train)

        orders = [np.stack(list(task.batches(seed, steps, 128))) for seed in range(seeds)]
        self.run, self.orders = run, orders

    def loss(self, rate: float) -> float:
        """The mean over seeds, and infinity where a run diverges."""
        if rate not in self.found:
            losses = []
            for seed, order in enumerate(self.orders):
                losses.append(float(self.run(rate, jax.random.key(seed), order)))
            mean = float(np.mean(losses))
            self.found[rate] = mean if math.isfinite(mean) else math.inf
        return self.found[rate]

    def best(self, begin: float) -> float:
        """The rate 2ᵏ · begin that is better than `WORSE` neighbours on either side."""
        best = begin
        while True:
            around = [best * 2.0**k for k in range(-WORSE, WORSE + 1)]
            better = min(around, key=self.loss)
            if better == best:
                return best
            best = better


def draw(path: Path, losses: dict[str, dict[int, dict[float, float]]]) -> None:
    """Loss by rate: a panel for each optimiser, a line for each width."""
    across = min(4, len(losses))
    down = math.ceil(len(losses) / across)
    figure = Figure(figsize=(2.2 * across, 2.3 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
    for axes, (method, by_width) in zip(panels, losses.items(), strict=False):
        for width, by_rate in by_width.items():
            known = sorted((rate, loss) for rate, loss in by_rate.items() if math.isfinite(loss))
            axes.plot(*zip(*known, strict=True), marker=".", label=f"width {width}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(method, fontsize=9)
        axes.grid(True, color="#dddddd", linewidth=0.6)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("training loss at the end", fontsize=9)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="widths 64 to 2048 and three seeds")
    parser.add_argument(
        "--quick", action="store_true", help="widths 8 and 16, few steps, two optimisers"
    )
    parser.add_argument("--steps", type=int, default=55, help="mini-batches, 11 to an epoch")
    parser.add_argument(
        "--figure", type=Path, help="file for a figure of the losses by rate: SVG, PNG or PDF"
    )
    options = parser.parse_args()
    widths, seeds, methods = (64, 256), 1, list(METHODS)
    if options.full:
        widths, seeds = (64, 256, 1024, 2048), 3
    if options.quick:
        widths, methods, options.steps = (8, 16), ["Adam", "Adam, spectral *"], 10
    last = f"loss at {widths[-1]}, rate"
    columns = ["optimiser", *map(str, widths), f"{last} its own", f"{last} of {widths[0]}"]
    print(f"| {' | '.join(columns)} |")
    print("|---|" + "---:|" * (len(widths) + 2))
    losses: dict[str, dict[int, dict[float, float]]] = {}
    for method in methods:
        rate, rates = METHODS[method][2], []
        for width in widths:
            search = Search(method, width, options.steps, seeds)
            rate = search.best(rate)
            rates.append(rate)
            losses.setdefault(method, {})[width] = search.found
        cells = [f"2^{math.log2(each):.0f}" for each in rates]
        cells += [f"{search.loss(each):.3g}" for each in (rate, rates[0])]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    if options.figure:
        draw(options.figure, losses)


if __name__ == "__main__":
    main()

"""Who can take part: an optimiser, its options, and five values of the one number that is tuned.

Everyone has five trials. Values of a kind lie the same factor apart, 4 for learning rates and 10 for λ, so that the
windows are equally wide (a factor of 256, and of 10⁴).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import gnlin
from gnlin import tree
from gnlin.compare.cost import gradient_flops, params_shapes, product_flops
from gnlin.compare.method import Method, from_optax
from gnlin.compare.task import Task

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """What can be said of a contestant beside the tuned number.

    Attributes:
        default: its value where nothing is said.
        parse: text ↦ value; raises ValueError.
        form: what is expected, for messages.
    """

    default: Any
    parse: Callable[[str], Any]
    form: str


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One optimiser of the comparison.

    Attributes:
        name: what the command line and the records call it.
        summary: one line on what it is.
        build: (task, options) ↦ method. The options hold the tuned number too, which may be a traced scalar, so that
            one compilation serves the grid.
        tuned: name of the tuned number.
        grid: its values, one trial each; or options ↦ values, where they depend on them.
        options: what else can be set.
        reason_absent: one line on why it cannot run here, with the remedy; `None` where it can.
        reason_unfit: one line on why it cannot run on a task; `None` where it can.
        family: who it belongs to: ``gnlin``, ``optax`` or ``peers``.
    """

    name: str
    summary: str
    build: Callable[[Task, Options], Method]
    tuned: str = "learning_rate"
    grid: tuple[float, ...] | Callable[[Options], tuple[float, ...]] = ()
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    reason_absent: Callable[[], str | None] = lambda: None
    reason_unfit: Callable[[Task], str | None] = lambda task: None
    family: str = "optax"

    def values(self, options: Options) -> tuple[float, ...]:
        """Values of the tuned number among which is chosen."""
        return self.grid(options) if callable(self.grid) else self.grid


def optax_contestant(
    name: str, make: Callable[[Any], optax.GradientTransformation], grid: tuple[float, ...], *, tuned="learning_rate"
) -> Contestant:
    """A contestant from any Optax transformation.

    Args:
        name: what to call it.
        make: tuned number ↦ transformation; the number may be traced. For a transformation that needs the objective use
            `Contestant` itself.
        grid: values of the tuned number, one trial each.
        tuned: what the number is.

    Example:
        >>> import optax
        >>> from gnlin.compare import optax_contestant
        >>> optax_contestant("lion", optax.lion, (1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2)).name
        'lion'
    """

    def build(task: Task, options: Options) -> Method:
        return from_optax(task.objective, make(options[tuned]))

    return Contestant(name, f"{name}, from outside.", build, tuned, tuple(grid), {"batch": batch()}, family="outside")


# Forms of options.


def integer(default: int) -> Option:
    return Option(default, _positive_integer, "a whole number of at least 1")


def number(default: float) -> Option:
    return Option(default, _number, "a number")


def switch(default: bool) -> Option:
    return Option(default, lambda text: {"yes": True, "no": False}[text], "yes or no")


def one_of(default: str, *others: str) -> Option:
    words = (default, *others)
    return Option(default, lambda text: words[words.index(text)], f"one of {', '.join(words)}")


def period(default: int) -> Option:
    def parse(text):
        return None if text == "never" else _positive_integer(text)

    return Option(default, parse, "a whole number of at least 1, or never")


def batch(default: str = "mini") -> Option:
    def parse(text):
        return text if text in ("mini", "full") else _positive_integer(text)

    return Option(default, parse, "mini (the task's), full, or a number of examples")


def _positive_integer(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _number(text: str) -> float:
    if not jnp.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


# First order, from Optax.


def _sgd(task: Task, options: Options) -> Method:
    return from_optax(task.objective, optax.sgd(options["learning_rate"], momentum=options["momentum"]))


def _adam(task: Task, options: Options) -> Method:
    return from_optax(task.objective, optax.adam(options["learning_rate"]))


def _adamw(task: Task, options: Options) -> Method:
    return from_optax(task.objective, optax.adamw(options["learning_rate"], weight_decay=options["weight_decay"]))


def _muon(task: Task, options: Options) -> Method:
    return from_optax(task.objective, optax.contrib.muon(options["learning_rate"]))


def _lbfgs(task: Task, options: Options) -> Method:
    """With Optax's zoom line search, whose last value and gradient are those of the next step."""
    objective = task.objective
    search = optax.scale_by_zoom_linesearch(
        max_linesearch_steps=20, initial_guess_strategy="one", max_learning_rate=options["max_step"]
    )
    tx = optax.lbfgs(memory_size=options["memory"], linesearch=search)

    def init(params, batch, key):
        del key
        value, grads = jax.value_and_grad(objective.value)(params, batch)
        return optax.tree.set(tx.init(params), value=value, grad=grads)

    def step(params, state, batch, key):
        del key
        value, grads = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        extras = {"value": value, "grad": grads, "value_fn": objective.value, "batch": batch}
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return Method(
        init,
        step,
        turns=lambda state: optax.tree.get(state, "num_linesearch_steps"),
        turn_flops=lambda: gradient_flops(task, _examples(task, options)),
    )


# The family.

_INNER: Mapping[str, Callable[[Options], optax.GradientTransformation]] = {
    "adam": lambda options: optax.adam(options["learning_rate"]),
    "sgd": lambda options: optax.sgd(options["learning_rate"], momentum=options["momentum"] or None),
    "adamw": lambda options: optax.adamw(options["learning_rate"]),
    "muon": lambda options: optax.contrib.muon(options["learning_rate"]),
}


def _iterative_linearisation(task: Task, options: Options) -> Method:
    tx = gnlin.iterative_linearisation(
        _INNER[options["inner"]](options),
        task.objective,
        options["period"],
        loss_model=options["loss_model"],
        reset_inner=options["reset"],
        line_search=(1.0, 0.5, 0.25) if options["line_search"] else None,
    )
    return from_optax(task.objective, tx)


def _prox_linear(task: Task, options: Options) -> Method:
    inner = _INNER[options["inner"]](options)
    tx = gnlin.prox_linear(inner, task.objective, options["steps"], loss_model=options["loss_model"])
    return from_optax(task.objective, tx)


def _solver(task: Task, options: Options) -> Any:
    small = tree.size(params_shapes(task)) <= _DENSE_AT_MOST
    if options["solver"] == "dense" or (options["solver"] == "auto" and small):
        return gnlin.Dense()
    return gnlin.CG(max_steps=options["max_steps"], rtol=options["rtol"], warm_start=options["warm_start"])


def _gauss_newton(task: Task, options: Options) -> Method:
    """Full steps; with ``control=decay`` λ falls from 1, since a small λ diverges while the outputs still move far."""
    tuned = options["damping"]
    damping: Any = {
        "decay": lambda count: jnp.maximum(jnp.exp(-count / options["decay"]), tuned),
        "constant": tuned,
        "gain-ratio": gnlin.GainRatio(tuned),
    }[options["control"]]
    tx = gnlin.gauss_newton(options["learning_rate"], task.objective, damping, solver=_solver(task, options))
    return from_optax(task.objective, tx, turn_flops=lambda: product_flops(task, _examples(task, options)))


def _levenberg_marquardt(task: Task, options: Options) -> Method:
    tx = gnlin.levenberg_marquardt(
        task.objective,
        initial_damping=options["damping"],
        scaling=options["scaling"],
        solver=_solver(task, options),
    )
    return from_optax(task.objective, tx, turn_flops=lambda: product_flops(task, _examples(task, options)))


def _trust_region(task: Task, options: Options) -> Method:
    tx = gnlin.levenberg_marquardt(
        task.objective,
        initial_damping=gnlin.TrustRegion(options["radius"]),
        scaling=options["scaling"],
        solver=gnlin.Dense(),
    )
    return from_optax(task.objective, tx)


def _too_large_to_factorise(task: Task) -> str | None:
    size = tree.size(params_shapes(task))
    if size <= _FACTORISED_AT_MOST:
        return None
    return f"it factorises a matrix of {size} columns, one for each parameter, at every step; take lm"


def _examples(task: Task, options: Options) -> int:
    return batch_size(task, options) or task.train_size


def batch_size(task: Task, options: Options) -> int | None:
    """Examples in each batch of a contestant; `None` for all training data."""
    wanted = options.get("batch", "full")
    if task.batch_size is None or wanted == "full":
        return None
    return task.batch_size if wanted == "mini" else min(wanted, task.train_size)


_RATES = (0.001, 0.004, 0.016, 0.064, 0.256)
_SGD_RATES = (0.01, 0.04, 0.16, 0.64, 2.56)


def _rates_of_inner(options: Options) -> tuple[float, ...]:
    return _SGD_RATES if options["inner"] == "sgd" else _RATES


# Parameters up to which `solver=auto` factorises, and beyond which a step costs too many gradients.
_DENSE_AT_MOST, _FACTORISED_AT_MOST = 1000, 2000
_SOLVER = {
    "solver": one_of("auto", "cg", "dense"),
    "max_steps": integer(10),
    "rtol": number(1e-2),
    "warm_start": number(0.0),
}

CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "sgd",
            "Stochastic gradient descent with momentum (Optax).",
            _sgd,
            grid=_SGD_RATES,
            options={"momentum": number(0.9), "batch": batch()},
        ),
        Contestant(
            "adam", "Adam (Optax): iterative linearisation with K = 1.", _adam, grid=_RATES, options={"batch": batch()}
        ),
        Contestant(
            "adamw",
            "Adam with decoupled weight decay (Optax).",
            _adamw,
            grid=_RATES,
            options={"weight_decay": number(1e-2), "batch": batch()},
        ),
        Contestant("muon", "Muon: orthogonalised momentum (Optax).", _muon, grid=_RATES, options={"batch": batch()}),
        Contestant(
            "lbfgs",
            "L-BFGS with zoom line search, full batch (Optax); tuned: longest step.",
            _lbfgs,
            tuned="max_step",
            grid=(0.25, 1.0, 4.0, 16.0, 64.0),
            options={"memory": integer(10)},
        ),
        Contestant(
            "il",
            "Iterative linearisation: the anchor moves every `period` steps of the inner optimiser.",
            _iterative_linearisation,
            grid=_rates_of_inner,
            options={
                "period": period(16),
                "inner": one_of("adam", "sgd", "adamw", "muon"),
                "momentum": number(0.9),
                "loss_model": one_of("exact", "quadratic"),
                "reset": switch(False),
                "line_search": switch(False),
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "prox-linear",
            "Full Gauss-Newton, prox-linear: `steps` inner steps on one batch in each update.",
            _prox_linear,
            grid=_rates_of_inner,
            options={
                "steps": integer(16),
                "inner": one_of("adam", "sgd", "adamw", "muon"),
                "momentum": number(0.9),
                "loss_model": one_of("exact", "quadratic"),
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "gn",
            "Damped Gauss-Newton by conjugate gradients, full steps.",
            _gauss_newton,
            tuned="damping",
            grid=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
            options={
                "learning_rate": number(1.0),
                "control": one_of("decay", "constant", "gain-ratio"),
                "decay": number(20.0),
                **_SOLVER,
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "lm",
            "Levenberg-Marquardt, full batch; tuned: first damping.",
            _levenberg_marquardt,
            tuned="damping",
            grid=(1e-3, 1e-2, 1e-1, 1.0, 10.0),
            options={
                **_SOLVER,
                "max_steps": integer(20),
                "warm_start": number(0.9),
                "scaling": one_of("identity", "marquardt"),
                "batch": batch("full"),
            },
            family="gnlin",
        ),
        Contestant(
            "lm-trust",
            "Levenberg-Marquardt with Moré's trust region, full batch; tuned: first radius.",
            _trust_region,
            tuned="radius",
            grid=(0.01, 0.1, 1.0, 10.0, 100.0),
            options={"scaling": one_of("marquardt", "identity"), "batch": batch("full")},
            reason_unfit=_too_large_to_factorise,
            family="gnlin",
        ),
    )
}

# Who takes part where nobody is named.
DEFAULT = ("sgd", "adam", "il:period=16", "il:period=256", "il:period=never", "gn", "sgd:batch=full", "lm")

"""The optimisers of Optax and of this package, as methods of the comparison."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import gnlin
from gnlin import tree
from gnlin.compare.entrants.contestant import Options
from gnlin.compare.entrants.eigenbasis import soap as soap_transform
from gnlin.compare.entrants.method import Method, from_optax, predict_with_network
from gnlin.compare.tasks.task import Task

# Up to so many parameters `solver=auto` factorises. Beyond so many a step costs too many gradients.
_DENSE_AT_MOST, _FACTORISED_AT_MOST = 1000, 2000

_MUON_HAS_DIMENSIONS = (
    "muon_weight_dimension_numbers" in inspect.signature(optax.contrib.muon).parameters
)


# First order, from Optax.


def sgd(task: Task, options: Options) -> Method:
    return from_optax(
        task.objective, optax.sgd(options["learning_rate"], momentum=options["momentum"])
    )


def adam(task: Task, options: Options) -> Method:
    return from_optax(task.objective, optax.adam(options["learning_rate"]))


def adamw(task: Task, options: Options) -> Method:
    return from_optax(
        task.objective, optax.adamw(options["learning_rate"], weight_decay=options["weight_decay"])
    )


def muon(task: Task, options: Options) -> Method:
    """With its defaults in Optax; by default the ends of a transformer are left to Adam.

    Its authors leave them to Adam (https://kellerjordan.github.io/posts/muon).
    """
    tx = _muon(task, options["learning_rate"], ends=options["ends"] == "muon")
    return from_optax(task.objective, tx)


def muon_unfit(task: Task) -> str | None:
    """Stacks of matrices need Muon's option for dimensions, which the oldest Optax has not."""
    stacked = any(leaf.ndim == 3 for leaf in jax.tree.leaves(task.params_shapes()))
    if _MUON_HAS_DIMENSIONS or not (stacked or task.ends):
        return None
    return (
        f"Muon of Optax {optax.__version__} knows neither stacks of matrices nor which leaves are "
        "hidden: pip install --upgrade optax"
    )


def _muon(task: Task, rate: Any, *, ends: bool = False) -> optax.GradientTransformation:
    """Muon for matrices and stacks of them, one matrix at a time; Adam for all else.

    Args:
        task: names the ends of a transformer.
        rate: of both.
        ends: whether the ends have Muon, too.
    """
    if reason := muon_unfit(task):
        raise ValueError(reason)
    if not _MUON_HAS_DIMENSIONS:
        return optax.contrib.muon(rate)

    def dimensions(path, leaf):
        is_end = bool(path) and getattr(path[0], "key", None) in task.ends
        if leaf.ndim not in (2, 3) or (is_end and not ends):
            return None
        return optax.contrib.MuonDimensionNumbers(-2, -1)

    return optax.contrib.muon(
        rate,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            dimensions, params
        ),
    )


def soap(task: Task, options: Options) -> Method:
    return from_optax(task.objective, soap_transform(options["learning_rate"]))


def lbfgs(task: Task, options: Options) -> Method:
    """With Optax's zoom line search. The next step reuses its last value and gradient."""
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

    return Method(init, step)


# The family.

_INNER: Mapping[str, Callable[[Options], optax.GradientTransformation]] = {
    "adam": lambda options: optax.adam(options["learning_rate"]),
    "sgd": lambda options: optax.sgd(
        options["learning_rate"], momentum=options["momentum"] or None
    ),
    "adamw": lambda options: optax.adamw(options["learning_rate"]),
}


def _inner(task: Task, options: Options) -> optax.GradientTransformation:
    if options["inner"] == "muon":
        return _muon(task, options["learning_rate"])
    return _INNER[options["inner"]](options)


def iterative_linearisation(task: Task, options: Options) -> Method:
    tx = gnlin.iterative_linearisation(
        _inner(task, options),
        task.objective,
        options["period"],
        loss_model=options["loss_model"],
        reset_inner=options["reset"],
        line_search=(1.0, 0.5, 0.25) if options["line_search"] else None,
    )
    method = from_optax(task.objective, tx)
    if options["period"] == 1:  # ordinary gradient steps, which train the network itself
        method = method._replace(predict=predict_with_network)
    return method._replace(cycle=options["period"] or 1)


def linearised_while_it_holds(task: Task, options: Options) -> Method:
    rule = gnlin.RelativeGap(
        options["gap"], options["patience"], options["every"], options["longest"]
    )
    return from_optax(
        task.objective,
        gnlin.iterative_linearisation(_inner(task, options), task.objective, rule),
    )


def prox_linear(task: Task, options: Options) -> Method:
    tx = gnlin.prox_linear(
        _inner(task, options), task.objective, options["steps"], loss_model=options["loss_model"]
    )
    if options["line_search"]:
        # It halves a step until the loss of its batch falls enough, at most ten times.
        search = optax.scale_by_backtracking_linesearch(
            max_backtracking_steps=10, decrease_factor=0.5, increase_factor=math.inf
        )
        tx = optax.chain(tx, search)
    return from_optax(task.objective, tx)


def _solver(task: Task, options: Options) -> gnlin.Solver:
    """A factorisation, or conjugate gradients."""
    small = tree.size(task.params_shapes()) <= _DENSE_AT_MOST
    if options["solver"] == "dense" or (options["solver"] == "auto" and small):
        return gnlin.Dense()
    return gnlin.CG(
        max_iterations=options["max_iterations"],
        rtol=options["rtol"],
        warm_start=options["warm_start"],
    )


def gauss_newton(task: Task, options: Options) -> Method:
    """The defaults of `gnlin.gauss_newton`; the tuned number is the least damping.

    ``step=momentum`` has λ in units of the problem. With ``step=subspace`` λ has the units of the
    curvature, and ``refresh=1`` then makes it the method that takes factors and trials at every
    step.
    """
    momentum = options["step"] == "momentum"
    solvers: dict[str, gnlin.Solver] = {
        "kronecker": gnlin.Kronecker(refresh=options["refresh"]),
        "cg": gnlin.CG(options["max_iterations"]),
        "dense": gnlin.Dense(),
    }
    tx = gnlin.gauss_newton(
        task.objective,
        learning_rate=options["learning_rate"],
        damping=(_relative if momentum else _absolute)(options["damping"]),
        solver=solvers[options["solver"]],
        step=gnlin.Momentum()
        if momentum
        else gnlin.Subspace(momentum=options["momentum"], loss_model=options["loss_model"]),
    )
    return from_optax(task.objective, tx, makes_gradient=True)


def _relative(least: Any) -> gnlin.GainRatio:
    """λ in units of the problem. On a batch that comes again it may fall a hundred times lower."""
    first: Any = jnp.maximum(least, 1.0)
    return gnlin.GainRatio(first, minimum=least, relative=True, minimum_again=least / 100)


def _absolute(least: Any) -> gnlin.GainRatio:
    """λ in units of the curvature."""
    first: Any = jnp.maximum(least, 1e-2)
    return gnlin.GainRatio(first, minimum=least)


def gauss_newton_eigenbasis(task: Task, options: Options) -> Method:
    """Adam in the eigenbasis of the factors, at a share of the step that is best for the batch."""
    tx = gnlin.gauss_newton(
        task.objective,
        learning_rate=options["learning_rate"],
        solver=gnlin.Eigenbasis(refresh=options["refresh"]),
    )
    return from_optax(task.objective, tx, makes_gradient=True)


def damped_gauss_newton(task: Task, options: Options) -> Method:
    """The textbook's full steps; with ``control=decay`` λ falls from 1.

    A small λ diverges as long as a step still moves the outputs far.
    """
    least: Any = options["damping"]

    def falling(count):
        return jnp.maximum(jnp.exp(-count / options["decay"]), least)

    damping = falling if options["control"] == "decay" else least
    tx = optax.chain(
        gnlin.scale_by_gauss_newton(task.objective, damping, solver=_solver(task, options)),
        optax.scale_by_learning_rate(options["learning_rate"]),
    )
    return from_optax(task.objective, tx, makes_gradient=True)


def levenberg_marquardt(task: Task, options: Options) -> Method:
    tx = gnlin.levenberg_marquardt(
        task.objective,
        damping=options["damping"],
        scaling=options["scaling"],
        solver=_solver(task, options),
    )
    return from_optax(task.objective, tx)


def trust_region(task: Task, options: Options) -> Method:
    tx = gnlin.levenberg_marquardt(
        task.objective,
        damping=gnlin.TrustRegion(options["radius"]),
        scaling=options["scaling"],
        solver=gnlin.Dense(),
    )
    return from_optax(task.objective, tx)


def too_large_to_factorise(task: Task) -> str | None:
    size = tree.size(task.params_shapes())
    if size <= _FACTORISED_AT_MOST:
        return None
    return (
        f"it factorises a matrix of {size} columns, one for each parameter, at every step; take lm"
    )

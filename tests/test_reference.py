"""Whole trajectories of the optimisers against naive dense loops, in float64.

The loops in `references` know the formulas and the two functions of an objective, and nothing of
the package. Parameters and all metrics must agree after every step.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import third_party, tolerance
from references.damping import Adaptive
from references.dense import Dense
from references.gauss_newton import DEFAULT, Step, gauss_newton
from references.kronecker import Kronecker, exact_root, krylov_root
from references.levenberg_marquardt import Radius, levenberg_marquardt
from references.linearised import (
    Gap,
    HeavyBall,
    Inner,
    iterative_linearisation,
    layers_linearised,
    prox_linear,
)
from references.networks import (
    class_batch,
    logistic,
    perceptron,
    regression_batch,
    robust,
    sequence,
    softmax,
    squared,
    two_class_batch,
)
from trajectories import check, compiled, follow, table

import gnlin

# gauss_newton


class Incoming(NamedTuple):
    """Updates that are not the gradient: a transform, and the same on flat vectors."""

    transform: optax.GradientTransformation
    on_vectors: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (gradient, θ) ↦ u


class Case(NamedTuple):
    """A run of `gauss_newton`; an omitted argument has its default."""

    network: Any
    loss: Callable
    steps: list[Step]
    root: Callable = exact_root  # of H, in the reference
    learning_rate: Any = 1.0
    damping: Any = DEFAULT
    rule: Mapping[str, Any] = MappingProxyType({})  # arguments of gnlin.Subspace
    kronecker: Mapping[str, Any] = MappingProxyType({})  # arguments of gnlin.Kronecker
    incoming: Incoming | None = None
    hidden: tuple[str, ...] = ()
    rejections: bool = False  # whether there are rejected steps, beside accepted ones


def regression(**changes):
    """A squared loss on one batch of 90, more than the 64 applications of the least share."""
    steps = [Step(regression_batch(90, seed=0))] * 8
    return Case(perceptron(2), squared, steps)._replace(**changes)


def classification(**changes):
    """A softmax loss on changing batches; H has many eigenvalues."""
    steps = [Step(class_batch(90, seed)) for seed in range(8)]
    return Case(perceptron(3), softmax, steps, krylov_root)._replace(**changes)


def misled(examples: int):
    """Curvature batches so small that their models mislead, and some steps are rejected."""
    return [Step(regression_batch(90, s), regression_batch(examples, 50 + s)) for s in range(10)]


def far_batch():
    """Targets in the straight part of the robust loss."""
    batch = regression_batch(90, seed=0)
    return {**batch, "y": 10 * batch["y"]}


def one_batch_of_nan():
    batches = [regression_batch(90, seed) for seed in range(6)]
    batches[3]["weight"] = np.full(90, np.nan)
    return [Step(batch) for batch in batches]


def clip_then_decay(gradient, theta):
    return gradient * min(1, 0.05 / np.linalg.norm(gradient)) + 0.01 * theta


CLIPPED = optax.chain(optax.clip_by_global_norm(0.05), optax.add_decayed_weights(0.01))
GAUSS_NEWTON = {
    "softmax loss": classification(),
    "logistic loss": Case(perceptron(1), logistic, [Step(two_class_batch(90, 0, distinct=4))] * 8),
    "sequence, a quarter of the applications": Case(
        sequence(2), squared, [Step(regression_batch(20, 0, positions=15))] * 8
    ),
    "robust loss": Case(
        perceptron(2), robust, [Step(far_batch())] * 6, krylov_root, rejections=True
    ),
    "curvature_batch": classification(
        steps=[Step(class_batch(90, seed), class_batch(40, 50 + seed)) for seed in range(8)]
    ),
    "rejected steps": regression(steps=misled(6), rejections=True),
    "limits of the damping": regression(
        steps=misled(8),
        damping=Adaptive(0.1, accept=0.3, minimum=0.05, maximum=0.3),
        rejections=True,
    ),
    "learning rate, no momentum, options of the factors": classification(
        learning_rate=0.7,
        rule={"momentum": False},
        kronecker={"decay": 0.5, "fraction": 0.9, "seed": 3},
    ),
    "schedule of the learning rate": regression(
        learning_rate=table(0.5, 0.7, 2.5, 2.5, 0.0, 1.0, 1.0, 0.9), rejections=True
    ),
    "quadratic model": classification(rule={"loss_model": "quadratic"}),
    "damping a number": regression(steps=misled(6), damping=0.02, rejections=True),
    "damping a schedule, max_norm": classification(
        damping=table(*np.geomspace(1, 1e-3, 8)), rule={"max_norm": 0.6}
    ),
    "masked leaves": classification(hidden=("in_bias", "out")),
    "clipping and decay": classification(incoming=Incoming(CLIPPED, clip_then_decay)),
    "a batch of NaN": regression(steps=one_batch_of_nan(), rejections=True),
}


def record(case: Case):
    given = {} if case.incoming is None else {"incoming": case.incoming.on_vectors}
    return gauss_newton(
        compiled(case.network, case.loss, case.hidden),
        Kronecker(case.network.layers, root=case.root, **case.kronecker),
        case.steps,
        learning_rate=case.learning_rate,
        damping=case.damping,
        **given,
        **case.rule,
    )


def transform(case: Case, objective):
    """The transform of a case, which pays for everything at every step."""
    options: dict[str, Any] = {"step": gnlin.Subspace(**case.rule)}
    options["damping"] = gnlin.GainRatio(1e-2, minimum=1e-3)
    options["solver"] = gnlin.Kronecker(**case.kronecker)
    if case.learning_rate != 1.0:
        options["learning_rate"] = case.learning_rate
    if case.damping is not DEFAULT:
        adaptive = isinstance(case.damping, Adaptive)
        options["damping"] = gnlin.GainRatio(*case.damping) if adaptive else case.damping
    tx = gnlin.gauss_newton(objective, **options)
    return optax.chain(third_party(case.incoming.transform), tx) if case.incoming else tx


@pytest.mark.parametrize("name", GAUSS_NEWTON)
def test_gauss_newton(x64, name):
    case = GAUSS_NEWTON[name]
    objective = gnlin.Objective(case.network.model, case.loss)
    steps = [
        (
            step.batch,
            {} if step.curvature_batch is None else {"curvature_batch": step.curvature_batch},
        )
        for step in case.steps
    ]
    how = {"hidden": case.hidden, "given": case.incoming is not None}
    expected = record(case)
    tx = transform(case, objective)
    check(follow(tx, objective, case.network.params, steps, **how), expected)
    # The weights in the plane are as good as Newton's method promises.
    assert max(each.shortfall for each in expected) < 1e-3
    accepted = {each.metrics["accepted"] for each in expected}
    assert accepted == ({True, False} if case.rejections else {True})


def test_a_batch_of_nan_leaves_the_damping_whatever_else_is_finite(x64):
    """Updates and the batch of the curvature may be finite where the loss is not."""
    case = regression()
    tx, params = transform(case, compiled(case.network, case.loss).objective), case.network.params
    gradient = jax.tree.map(jnp.ones_like, params)
    batch, curvature_batch = one_batch_of_nan()[3].batch, regression_batch(90, seed=0)
    extra = {"batch": batch, "curvature_batch": curvature_batch}
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params, **extra)
    assert state.damping.damping == DEFAULT.initial
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))


# iterative_linearisation, linearise_gradients and prox_linear


NETWORK = perceptron(3)
OBJECTIVE = gnlin.Objective(NETWORK.model, softmax)
BATCHES = [class_batch(12, seed) for seed in range(11)]
STEPS = [(batch, {}) for batch in BATCHES]


class Curious(Inner):
    """A step that depends on all that an inner optimiser is given: value, gradient and function."""

    def step(self, q, theta):
        here = q(theta)
        return -0.3 * here.gradient * q(theta - 0.1 * here.gradient).value / here.value


def curious():
    """The same as a transform."""

    def update(updates, state, params, *, value, grad, value_fn, **extra):
        ahead = value_fn(jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, grad))
        return jax.tree.map(lambda g: -0.3 * g * ahead / value, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def heavy_ball():
    return third_party(optax.sgd(0.2, momentum=0.8)), HeavyBall(0.2, 0.8)


class Cycles(NamedTuple):
    """A run of `iterative_linearisation`, or of `linearise_gradients` and an inner optimiser."""

    period: Any
    refreshes: int  # how often the anchor moves
    options: Mapping[str, Any] = MappingProxyType({})
    inner: Callable = heavy_ball
    chain: bool = False


CYCLES = {
    "period 1": Cycles(1, 11),
    "period 3": Cycles(3, 4),
    "period 3, chain, quadratic": Cycles(3, 4, {"loss_model": "quadratic"}, chain=True),
    "never": Cycles(None, 1),
    "schedule": Cycles(table(1.2, 3.6, 0, 0, 0, 2.0, 0, 1.0, 0.4, 2.0, 2.0), 6),
    "relative gap": Cycles(gnlin.RelativeGap(0.03), 3),
    "relative gap, every second": Cycles(gnlin.RelativeGap(0.1, patience=1, every=2), 3),
    "relative gap, longest": Cycles(gnlin.RelativeGap(0.3, patience=2, longest=4), 3),
    "reset_inner": Cycles(4, 3, {"reset_inner": True}),
    "line search": Cycles(2, 6, {"line_search": (0.3, 1.0, 3.0), "reset_inner": True}),
    "value and function": Cycles(3, 4, inner=lambda: (curious(), Curious())),
    "all": Cycles(
        gnlin.RelativeGap(0.1, patience=1, longest=4),
        3,
        {"loss_model": "quadratic", "reset_inner": True, "line_search": (1.0, 2.0, 0.5)},
    ),
}


@pytest.mark.parametrize("name", CYCLES)
def test_iterative_linearisation(x64, name):
    case = CYCLES[name]
    transform, inner = case.inner()
    if case.chain:
        tx = gnlin.linearise_gradients(OBJECTIVE, case.period, **case.options)
        tx = optax.chain(tx, transform)
    else:
        tx = gnlin.iterative_linearisation(transform, OBJECTIVE, case.period, **case.options)
    rule = isinstance(case.period, gnlin.RelativeGap)
    period = Gap(**vars(case.period)) if rule else case.period
    problem = compiled(NETWORK, softmax)
    expected = iterative_linearisation(problem, inner, BATCHES, period, **case.options)
    check(follow(tx, OBJECTIVE, NETWORK.params, STEPS), expected)
    assert expected[-1].metrics["linearise/refreshes"] == case.refreshes


LABELS = {"in": "early", "in_bias": "early", "scale": "late", "out": "late", "out_bias": "early"}
LAYERS = {
    "none is exact": ({"early": 3, "late": None}, {}),
    "one is exact": ({"early": 4, "late": 1}, {}),
    "one is exact, quadratic": (
        {"early": 1, "late": table(3, 0, 0, 2, 0, 4, 0, 0, 0, 2, 0)},
        {"loss_model": "quadratic"},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_at_their_own_pace(x64, name):
    periods, options = LAYERS[name]
    transform, inner = heavy_ball()
    period = gnlin.LayerPeriods(periods, LABELS)
    tx = gnlin.iterative_linearisation(transform, OBJECTIVE, period, **options)
    params = NETWORK.params
    labels = [LABELS[leaf] for leaf in sorted(params) for _ in range(params[leaf].size)]
    problem = compiled(NETWORK, softmax)
    expected = layers_linearised(problem, inner, BATCHES, periods, labels, **options)
    check(follow(tx, OBJECTIVE, params, STEPS), expected)


@pytest.mark.parametrize(
    ("loss_model", "hidden"), [("exact", ()), ("quadratic", ("scale", "in_bias"))]
)
def test_prox_linear(x64, loss_model, hidden):
    transform, inner = heavy_ball() if hidden else (curious(), Curious())
    tx = gnlin.prox_linear(transform, OBJECTIVE, 5, loss_model=loss_model)
    problem = compiled(NETWORK, softmax, hidden)
    expected = prox_linear(problem, inner, BATCHES, 5, loss_model=loss_model)
    check(follow(tx, OBJECTIVE, NETWORK.params, STEPS, hidden=hidden), expected)


# levenberg_marquardt


class Fit(NamedTuple):
    """A run of `levenberg_marquardt`."""

    policy: Adaptive | Radius | float  # a float: the first λ of the default
    solver: Any = gnlin.Dense()
    scaling: str = "identity"
    geodesic_acceleration: float | None = None
    fitted: str = "decays"
    rejections: bool = True


def decays():
    """Two exponential decays, four parameters, by least squares from a poor start."""
    x = np.linspace(0.0, 3.0, 20)
    batch = {"x": x, "y": 3 * np.exp(-2 * x) + np.exp(-0.3 * x)}

    def residuals(params, batch):
        decayed = jnp.exp(-params["rates"][None, :] * batch["x"][:, None])
        return jnp.sum(params["sizes"][None, :] * decayed, axis=1) - batch["y"]

    start = {"sizes": np.array([0.5, 4.0]), "rates": np.array([-0.5, -0.6])}
    return gnlin.Objective.least_squares(residuals), start, [batch] * 10


def two_classes():
    """A network under a logistic loss, whose H changes, on changing batches."""
    network = perceptron(1)
    batches = [two_class_batch(40, seed, distinct=40) for seed in range(6)]
    return gnlin.Objective(network.model, logistic), network.params, batches


PROBLEMS = {"decays": decays, "classes": two_classes}
CONVERGED = gnlin.CG(max_iterations=200, rtol=1e-13)

FITS = {
    "a number": Fit(1e-3),
    "limits of the damping": Fit(Adaptive(1.0, accept=0.2, minimum=0.5, maximum=1.2)),
    "marquardt": Fit(Adaptive(1e-5), scaling="marquardt"),
    "CG, marquardt": Fit(
        Adaptive(1e-1), CONVERGED, "marquardt", fitted="classes", rejections=False
    ),
    "acceleration": Fit(Adaptive(1e-2), geodesic_acceleration=0.75),
    "radius": Fit(Radius()),
    "radius, marquardt": Fit(Radius(3.0), scaling="marquardt"),
    "radius, classes": Fit(Radius(0.5, accept=0.1), fitted="classes", rejections=False),
    "radius, acceleration": Fit(Radius(), scaling="marquardt", geodesic_acceleration=0.75),
}


@pytest.mark.parametrize("name", FITS)
def test_levenberg_marquardt(x64, name):
    fit = FITS[name]
    objective, start, batches = PROBLEMS[fit.fitted]()
    options = {"scaling": fit.scaling, "geodesic_acceleration": fit.geodesic_acceleration}
    policy, damping = fit.policy, fit.policy
    if isinstance(policy, float):
        policy = Adaptive(policy)
    elif isinstance(policy, Adaptive):
        damping = gnlin.GainRatio(*policy)
    else:
        damping = gnlin.TrustRegion(*policy) if policy != Radius() else None  # the default
    tx = gnlin.levenberg_marquardt(objective, damping=damping, solver=fit.solver, **options)
    found = follow(tx, objective, start, [(batch, {}) for batch in batches])
    for _, metrics in found:
        solver = "cg" if fit.solver is CONVERGED else "dense"
        of_solver = {name: metrics.pop(name) for name in [*metrics] if name.startswith(solver)}
        assert of_solver[f"{solver}/converged"]
        assert of_solver[f"{solver}/residual"] < 1e-10
    expected = levenberg_marquardt(Dense(objective, start), batches, policy, **options)
    # The exponentials of a step that overshoots magnify the roundings of its rates.
    check(found, expected, tolerance(jnp.float64, scale=1e7))
    accepted = {each.metrics["accepted"] for each in expected}
    assert accepted == ({True, False} if fit.rejections else {True})


def test_levenberg_marquardt_begins_at_a_thousandth(x64):
    objective, start, (batch, *_) = decays()
    ((_, metrics),) = follow(gnlin.levenberg_marquardt(objective), objective, start, [(batch, {})])
    assert metrics["damping"] == 1e-3

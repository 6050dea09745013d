"""What Optax users may take for granted, asked of every transform in the same way.

Each case is a record that builds its transform; the checks know nothing of which one they have in
hand. The problem has a tuple and a None leaf among its parameters, and every update is given
arguments that are not its own.
"""

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import chex
import equinox
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import export
from problems import (
    Dtypes,
    classifier,
    enable_x64,
    host_copy,
    linear_regression,
    logistic_regression,
    third_party,
    third_party_model,
    tolerance,
)

import gnlin

DAMPING_SCHEDULE = third_party(optax.exponential_decay(0.2, transition_steps=1, decay_rate=0.9))
PERIOD_SCHEDULE = third_party(
    optax.piecewise_constant_schedule(1, {1: 2})
)  # cycles of 1, then of 2


def for_everyone(value, grads, params, batch, objective):
    """What one training loop that serves every optimiser passes, and an argument that no transform
    knows.
    """
    return {
        "batch": batch,
        "value": value,
        "grad": grads,
        "value_fn": objective.value,
        "unrelated": jnp.ones(3),
    }


def for_line_searches(value, grads, params, batch, objective):
    """Optax's line searches raise on every argument that their `value_fn` does not take."""
    return {"batch": batch, "value": value, "grad": grads, "value_fn": objective.value}


def with_whole_tree(extras):
    def extended(value, grads, params, batch, objective):
        return {**extras(value, grads, params, batch, objective), "all_params": params}

    return extended


def guarded(subject):
    """What a user wraps around a transform that follows its gradient wherever it leads."""
    return subject.compiled_wrapped, subject.wrapped.init


def unguarded(subject):
    return subject.compiled, subject.tx.init


@dataclasses.dataclass(frozen=True)
class Case:
    """One transform.

    Attributes:
        name: of the test.
        build: objective ↦ transform that descends, learning rate included.
        inject: the same with its hyperparameters injected by Optax.
        hyperparameters: names that Optax then shows.
        metrics: names that `gnlin.metrics` must show, among others.
        extras: ``(value, grads, params, batch, objective) -> dict``, the extra arguments of update.
        guard: subject ↦ ``(compiled step, init)`` that meets a NaN batch.
        notices_nan: (state, its metrics) after a NaN batch ↦ whether they say so.
        convex_steps: updates in which linear regression is solved ...
        convex_accuracy: ... to this fraction of the distance from the start.
    """

    name: str
    build: Callable[[gnlin.Objective], optax.GradientTransformation]
    inject: Callable[[gnlin.Objective], optax.GradientTransformation]
    hyperparameters: frozenset[str]
    metrics: frozenset[str]
    extras: Callable[..., dict[str, Any]] = for_everyone
    guard: Callable[..., Any] = unguarded
    notices_nan: Callable[[Any, dict], bool] = lambda opt_state, metrics: (
        opt_state["ours"].total_notfinite == 1
    )
    convex_steps: int = 1
    convex_accuracy: float = 1e-3


LINEARISED = frozenset({"linearise/loss", "linearise/refreshes", "linearise/age"})
CG_STATS = frozenset({"cg/iterations", "cg/residual", "cg/converged"})
DENSE_STATS = frozenset({"dense/residual", "dense/converged"})
STEP = frozenset({"momentum/length", "momentum/conjugate", "gain_ratio", "loss", "accepted"})
LM_STATS = frozenset({"loss", "accepted", "gain_ratio", "damping", "rejections"})


def linearised(name, inner, convex_steps, *, period, loss_model="exact", metrics=LINEARISED):
    """`linearise_gradients` chained with an inner optimiser."""

    def build(objective):
        return optax.chain(
            gnlin.linearise_gradients(objective, period, loss_model=loss_model), inner
        )

    def inject(objective):
        factory = optax.inject_hyperparams(gnlin.linearise_gradients)
        return optax.chain(factory(objective, period, loss_model=loss_model), inner)

    return Case(
        f"linearise_gradients-{name}",
        build,
        inject,
        frozenset({"period"} if isinstance(period, int) or callable(period) else ()),
        metrics,
        guard=guarded,
        convex_steps=convex_steps,
    )


def cycles(name, inner, convex_steps, *, metrics=frozenset(), **options):
    """`iterative_linearisation` with period 3."""

    def build(objective):
        return gnlin.iterative_linearisation(inner, objective, 3, **options)

    def inject(objective):
        return optax.inject_hyperparams(gnlin.iterative_linearisation)(
            inner, objective, 3, **options
        )

    return Case(
        f"iterative_linearisation-{name}",
        build,
        inject,
        frozenset({"period"}),
        LINEARISED | metrics,
        guard=guarded,
        convex_steps=convex_steps,
    )


def first_and_rest(params):
    """Labels of the leaves, whatever the parameters."""
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, ["first", *["rest"] * (len(leaves) - 1)][: len(leaves)])


LAYERWISE = frozenset(
    f"linearise/{what}/{label}" for what in ("refreshes", "age") for label in ("first", "rest")
)
DRIFT = frozenset({"kernel/alignment", "kernel/centred_alignment", "kernel/distance", "kernel/age"})


def drifting(name, inner, convex_steps):
    """`measure_kernel_drift` around iterative linearisation that keeps an anchor as long as it
    holds.
    """
    probe = jax.tree.map(lambda leaf: leaf[:5], classifier().batches[0])

    def build(objective, measure=gnlin.measure_kernel_drift):
        kept = gnlin.iterative_linearisation(inner, objective, gnlin.RelativeGap(0.3))
        return measure(kept, objective, probe, 2)

    def inject(objective):
        return build(
            objective, optax.inject_hyperparams(gnlin.measure_kernel_drift, static_args="every")
        )

    return Case(
        f"measure_kernel_drift-{name}",
        build,
        inject,
        frozenset(),
        DRIFT | LINEARISED | {"linearise/gap"},
        guard=guarded,
        convex_steps=convex_steps,
    )


def scaled(
    scale, name, inner, convex_steps, *, static=(), metrics=frozenset(), convex_accuracy=1e-3
):
    """`linearise_gradients`, an inner optimiser and a scaling by layers, at a rate that falls."""
    rate = third_party(optax.exponential_decay(0.2, transition_steps=1, decay_rate=0.9))

    def build(objective, scale=scale):
        first = gnlin.linearise_gradients(objective, 2)
        return optax.chain(first, inner, scale(), third_party(optax.scale_by_learning_rate(rate)))

    def inject(objective):
        return build(objective, optax.inject_hyperparams(scale, static_args=static))

    return Case(
        f"{scale.__name__}-{name}",
        build,
        inject,
        frozenset(),
        LINEARISED | metrics,
        guard=guarded,
        convex_steps=convex_steps,
        convex_accuracy=convex_accuracy,
    )


def prox(name, inner, convex_steps, *, extras=for_everyone, convex_accuracy=1e-3, **options):
    """`prox_linear` with 4 inner steps; their number is the length of a loop, so static."""

    def build(objective):
        return gnlin.prox_linear(inner, objective, 4, **options)

    def inject(objective):
        return optax.inject_hyperparams(gnlin.prox_linear, static_args="steps")(
            inner, objective, 4, **options
        )

    return Case(
        f"prox_linear-{name}",
        build,
        inject,
        frozenset(),
        frozenset({"prox/loss", "prox/linearised_loss"}),
        extras,
        notices_nan=lambda _, metrics: np.isnan(metrics["prox/loss"]),
        convex_steps=convex_steps,
        convex_accuracy=convex_accuracy,
    )


def preconditioned(name, solver, stats, key):
    """`scale_by_gauss_newton` and a learning rate."""

    def build(objective):
        return optax.chain(
            gnlin.scale_by_gauss_newton(objective, 0.1, solver=solver),
            optax.scale_by_learning_rate(1.0),
        )

    def inject(objective):
        factory = optax.inject_hyperparams(gnlin.scale_by_gauss_newton)
        return optax.chain(
            factory(objective, 0.1, solver=solver), optax.scale_by_learning_rate(1.0)
        )

    return Case(
        f"scale_by_gauss_newton-{name}",
        build,
        inject,
        frozenset({"damping"}),
        stats | {"damping"},
        notices_nan=lambda _, metrics: not metrics[key],
        convex_steps=12,
    )


def descending(name, damping, hyperparameters, metrics, key="cg/converged", **options):
    """`gauss_newton` with one kind of damping."""

    def build(objective):
        return gnlin.gauss_newton(objective, learning_rate=0.9, damping=damping, **options)

    def inject(objective):
        factory = optax.inject_hyperparams(gnlin.gauss_newton)
        return factory(objective, learning_rate=0.9, damping=damping, **options)

    return Case(
        f"gauss_newton-{name}",
        build,
        inject,
        hyperparameters,
        metrics | {"damping"},
        notices_nan=lambda _, metrics: not metrics[key],
        convex_steps=20,
    )


def accepting(name, stats, key, *, damping=1.0, **options):
    """`levenberg_marquardt`, damped enough from the start to accept steps on small batches."""

    def build(objective):
        return gnlin.levenberg_marquardt(objective, damping=damping, **options)

    def inject(objective):
        factory = optax.inject_hyperparams(gnlin.levenberg_marquardt)
        return factory(objective, damping=damping, **options)

    return Case(
        f"levenberg_marquardt-{name}",
        build,
        inject,
        frozenset({"damping"} if isinstance(damping, float) else ()),
        LM_STATS | stats,
        notices_nan=lambda _, metrics: not metrics["accepted"] and not metrics[key],
        convex_steps=12,
    )


CASES = [
    linearised("every-step-sgd", third_party(optax.sgd(0.5)), 30, period=1),
    linearised("every-third-adam", third_party(optax.adam(0.05)), 250, period=3),
    linearised(
        "never-momentum",
        third_party(optax.sgd(0.1, momentum=0.5)),
        80,
        period=None,
        loss_model="quadratic",
    ),
    linearised("schedule-adam", third_party(optax.adam(0.05)), 250, period=PERIOD_SCHEDULE),
    linearised(
        "relative-gap-adam",
        third_party(optax.adam(0.05)),
        250,
        period=gnlin.RelativeGap(0.2, every=2, longest=20),
        metrics=LINEARISED | {"linearise/gap"},
    ),
    linearised(
        "layers-sgd",
        third_party(optax.sgd(0.5)),
        30,
        period=gnlin.LayerPeriods({"first": 3, "rest": 1}, first_and_rest),
        metrics=LAYERWISE | {"linearise/loss"},
    ),
    drifting("adam", third_party(optax.adam(0.05)), 250),
    cycles("plain-adam", third_party(optax.adam(0.05)), 250),
    cycles("reset-momentum", third_party(optax.sgd(0.2, momentum=0.5)), 60, reset_inner=True),
    cycles(
        "line-search-sgd",
        third_party(optax.sgd(0.5)),
        40,
        line_search=(1.0, 0.5, 0.25),
        metrics=frozenset({"line_search/alpha"}),
    ),
    scaled(
        gnlin.width.scale_by_spectral_condition,
        "sgd",
        optax.identity(),
        80,
        static="lanczos_steps",
        metrics=frozenset({"spectral/largest", "spectral/smallest"}),
    ),
    scaled(
        gnlin.width.scale_by_maximal_update_adam,
        "adam",
        third_party(optax.scale_by_adam()),
        80,
        convex_accuracy=0.1,
    ),
    # Adam started afresh moves each parameter by its rate however near the solution is.
    prox(
        "adam-quadratic",
        third_party(optax.adam(0.02)),
        100,
        loss_model="quadratic",
        convex_accuracy=0.1,
    ),
    prox("lbfgs", third_party(optax.lbfgs()), 5, extras=for_line_searches),
    preconditioned("cg", gnlin.CG(max_iterations=20), CG_STATS, "cg/converged"),
    preconditioned(
        "warm-start", gnlin.CG(max_iterations=20, warm_start=0.9), CG_STATS, "cg/converged"
    ),
    preconditioned("dense", gnlin.Dense(), DENSE_STATS, "dense/converged"),
    descending(
        "schedule",
        DAMPING_SCHEDULE,
        frozenset({"learning_rate", "damping"}),
        CG_STATS | STEP,
        solver=gnlin.CG(),
    ),
    descending(
        "gain-ratio",
        gnlin.GainRatio(0.2),
        frozenset({"learning_rate"}),
        CG_STATS | STEP,
        solver=gnlin.CG(),
    ),
    descending(
        "adaptive",
        gnlin.GainRatio(1e-2, minimum=1e-3),
        frozenset({"learning_rate"}),
        STEP | {"kronecker/finite"},
        "kronecker/finite",
    ),
    accepting("cg", CG_STATS, "cg/converged"),
    accepting(
        "trust-region",
        DENSE_STATS | {"radius"},
        "dense/converged",
        damping=gnlin.TrustRegion(0.1),
        solver=gnlin.Dense(),
        scaling="marquardt",
    ),
    accepting("geodesic", CG_STATS | {"acceleration"}, "cg/converged", geodesic_acceleration=0.75),
]

# Where a wrapper does the work, the most intricate transform of each kind stands for the others.
_INTRICATE = (
    "linearise_gradients-every-third-adam",
    "iterative_linearisation-line-search-sgd",
    "linearise_gradients-layers-sgd",
    "measure_kernel_drift-adam",
    "scale_by_spectral_condition-sgd",
    "prox_linear-lbfgs",
    "scale_by_gauss_newton-warm-start",
    "scale_by_gauss_newton-dense",
    "gauss_newton-adaptive",
    "levenberg_marquardt-trust-region",
    "levenberg_marquardt-geodesic",
)
each_kind = pytest.mark.parametrize(
    "subject",
    [next(case for case in CASES if case.name == name) for name in _INTRICATE],
    ids=lambda case: case.name,
    indirect=True,
    scope="module",
)


def make_step(tx, objective, extras):
    """One line of a training loop: from parameters and state to the next ones."""

    def step(params, opt_state, batch):
        value, grads = objective.value_and_grad(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, **extras(value, grads, params, batch, objective)
        )
        return optax.apply_updates(params, updates), opt_state

    return step


class Subject:
    """One case on the classifier, trained once in float32 with donated buffers; the checks share
    what it compiles.
    """

    def __init__(self, case: Case):
        self.case = case
        self.problem = classifier()
        self.tx = case.build(self.problem.objective)
        self.wrapped = optax.named_chain(
            ("clip", optax.clip_by_global_norm(1e6)),
            ("ours", optax.apply_if_finite(self.tx, max_consecutive_errors=5)),
            ("after", optax.identity()),
        )
        self.traces = 0
        self.step = make_step(self.tx, self.problem.objective, case.extras)

        def counted(params, opt_state, batch):
            self.traces += 1
            return self.step(params, opt_state, batch)

        self.compiled = jax.jit(counted, donate_argnums=(0, 1))
        self.compiled_wrapped = jax.jit(
            make_step(self.wrapped, self.problem.objective, case.extras), donate_argnums=(0, 1)
        )

    def start(self):
        """Fresh buffers, so that donating them leaves the problem alone."""
        return jax.tree.map(jnp.array, self.problem.params)

    @functools.cached_property
    def trajectory(self) -> list[tuple[Any, Any]]:
        """Parameters and state before the first step and after each."""
        return self.run(self.compiled, self.tx.init)

    def run(self, compiled, init, batches=None):
        params = self.start()
        carry = (params, init(params))
        visited = [host_copy(carry)]
        for batch in self.problem.batches if batches is None else batches:
            carry = compiled(*carry, batch)
            visited.append(host_copy(carry))
        return visited

    def loss(self, params):
        return np.mean(
            [float(self.problem.objective.value(params, batch)) for batch in self.problem.batches]
        )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def subject(request):
    return Subject(request.param)


def test_compiles_once(subject):
    assert len(subject.trajectory) == len(subject.problem.batches) + 1
    assert subject.traces == 1
    assert subject.compiled._cache_size() == 1


def test_state_keeps_its_form(subject):
    """Structure, shapes, dtypes and weak types are those of `init`, for parameters and state."""
    params = subject.start()
    before = (params, subject.tx.init(params))
    after = jax.eval_shape(subject.step, *before, subject.problem.batches[0])
    chex.assert_trees_all_equal_structs(before, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    for (path, old), new in zip(
        jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        assert old.weak_type == new.weak_type, jax.tree_util.keystr(path)


def test_donated_buffers_are_distinct(subject):
    """No buffer stands twice in parameters and state, so that both can be donated; and both are
    consumed.
    """
    params = subject.start()
    opt_state = subject.tx.init(params)
    owners = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, opt_state))]
    assert len(set(owners)) == len(owners)
    subject.compiled(params, opt_state, subject.problem.batches[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_loss_decreases(subject):
    before, after = (subject.loss(subject.trajectory[i][0]) for i in (0, -1))
    assert np.isfinite(after)
    assert after < before


def test_metrics_are_finite_scalars(subject):
    metrics = gnlin.metrics(subject.trajectory[-1][1])
    assert subject.case.metrics <= metrics.keys()
    for name, value in metrics.items():
        assert value.shape == (), name
        assert np.isfinite(value), name


def through_orbax(path, carry, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


def through_orbax_steps(path, carry, target):
    """Orbax' manager of the checkpoints of a run."""
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(carry))
        manager.wait_until_finished()
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target))


def through_flax(path, carry, target):
    (path / "state").write_bytes(flax.serialization.to_bytes(carry))
    # Flax fills a tree that has the form of the state, and does not look at its values.
    return flax.serialization.from_bytes(target, (path / "state").read_bytes())


def through_equinox(path, carry, target):
    equinox.tree_serialise_leaves(path / "state", carry)
    return equinox.tree_deserialise_leaves(path / "state", target)


def through_pickle(path, carry, target):
    del target
    (path / "state").write_bytes(pickle.dumps(carry))
    return pickle.loads((path / "state").read_bytes())


@pytest.mark.parametrize(
    "through",
    [through_orbax, through_orbax_steps, through_flax, through_equinox, through_pickle],
    ids=["orbax", "orbax-steps", "flax", "equinox", "pickle"],
)
def test_checkpoint_round_trip(subject, through, tmp_path):
    """A run that is written in the middle and read back goes on as if nothing had happened."""
    target = jax.eval_shape(lambda params: (params, subject.tx.init(params)), subject.start())
    carry = third_party_model(through)(tmp_path, subject.trajectory[3], target)
    carry = jax.tree.map(jnp.asarray, carry)
    for batch in subject.problem.batches[3:]:
        carry = subject.compiled(*carry, batch)
    chex.assert_trees_all_equal(host_copy(carry), subject.trajectory[-1])


def test_a_step_is_exported_for_batches_of_any_size(subject):
    params, opt_state = subject.trajectory[2]
    leaves, structure = jax.tree.flatten(opt_state)

    def step(params, leaves, batch):
        after = subject.step(params, jax.tree.unflatten(structure, leaves), batch)
        return jax.tree.leaves(after)

    # Direct solvers want to know whether there are more outputs than parameters.
    (size,) = export.symbolic_shape("size", constraints=["size >= 10", "size <= 64"])
    batch = subject.problem.batches[2]
    of_any_size = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), batch
    )
    exported = export.export(jax.jit(step))(params, leaves, of_any_size)
    found = exported.call(params, leaves, batch)
    expected = jax.tree.leaves(subject.trajectory[3])
    chex.assert_trees_all_close(host_copy(found), expected, rtol=1e-4, atol=1e-5)


def test_no_leaf_of_a_state_is_empty(subject):
    """Orbax refuses arrays without entries."""
    assert all(np.size(leaf) for leaf in jax.tree.leaves(subject.trajectory[-1]))


def test_a_checkpoint_without_its_form_is_refused(subject, tmp_path):
    """Orbax then gives dictionaries, in which no state would be found."""
    _, opt_state = third_party_model(through_orbax)(tmp_path, subject.trajectory[3], None)
    params, objective = subject.start(), subject.problem.objective
    batch = subject.problem.batches[0]
    for use in (
        lambda: subject.step(params, opt_state, batch),
        lambda: gnlin.metrics(opt_state),
        lambda: gnlin.predict(objective, opt_state, params, batch),
        lambda: gnlin.anchor(opt_state),
    ):
        with pytest.raises(
            ValueError, match=r"restored without its form.*jax\.eval_shape\(tx\.init"
        ):
            use()


def test_map_params_finds_the_copies_of_the_parameters(subject):
    """What in the state is shaped like the parameters is what sharding by parameters reaches."""
    opt_state = subject.tx.init(subject.start())

    def changed_leaf(leaf):
        return ~leaf if leaf.dtype == bool else leaf + 1

    mapped = optax.tree_map_params(
        subject.tx, changed_leaf, opt_state, transform_non_params=lambda leaf: leaf
    )
    chex.assert_trees_all_equal_structs(opt_state, mapped)
    changed = jax.tree.leaves_with_path(
        jax.tree.map(lambda old, new: bool(jnp.any(old != new)), opt_state, mapped)
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(subject.problem.params)}
    for (path, found), leaf in zip(changed, jax.tree.leaves(opt_state), strict=True):
        # Moments lie in trees like the parameters', as Adafactor's; singular vectors and counters
        # too.
        moments = {".left", ".right", ".vectors", ".moves"} & {str(key) for key in path}
        assert found == (leaf.shape in shapes) or moments


def test_missing_arguments_are_named(subject):
    params = subject.start()
    opt_state = subject.tx.init(params)
    with pytest.raises(ValueError, match="`params` is missing"):
        subject.tx.update(params, opt_state, batch=subject.problem.batches[0])
    with pytest.raises(ValueError, match=r"`batch` is missing.*bind"):
        subject.tx.update(params, opt_state, params)


@each_kind
def test_scanned_ensemble_equals_loops(subject):
    """Two members from different starts, vectorised and scanned over the batches, go as each goes
    alone.
    """
    starts = [subject.start(), jax.tree.map(lambda leaf: leaf * 0.5, subject.start())]
    members = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    def body(carry, batch):
        return jax.vmap(subject.step, in_axes=(0, 0, None))(*carry, batch), None

    @jax.jit
    def run(members):
        return jax.lax.scan(
            body, (members, jax.vmap(subject.tx.init)(members)), subject.problem.stacked
        )[0][0]

    together = run(members)
    second = (starts[1], subject.tx.init(starts[1]))
    for batch in subject.problem.batches:
        second = subject.compiled(*second, batch)
    alone = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), subject.trajectory[-1][0], host_copy(second[0])
    )
    # Other fusions round differently, and six steps of an adaptive method amplify that.
    chex.assert_trees_all_close(together, alone, **tolerance(jnp.float32, 5000))


def test_injected_hyperparameters(subject):
    """With its hyperparameters in the state a transform does the same, in one compilation."""
    tx = subject.case.inject(subject.problem.objective)
    compiled = jax.jit(make_step(tx, subject.problem.objective, subject.case.extras))
    visited = subject.run(compiled, tx.init, subject.problem.batches[:4])
    states = jax.tree.leaves(visited[-1][1], is_leaf=lambda node: hasattr(node, "hyperparams"))
    shown = {name for node in states if hasattr(node, "hyperparams") for name in node.hyperparams}
    assert subject.case.hyperparameters <= shown
    assert compiled._cache_size() == 1
    chex.assert_trees_all_close(
        visited[-1][0], subject.trajectory[4][0], **tolerance(jnp.float32, 1000)
    )


@each_kind
def test_named_chain_and_apply_if_finite_change_nothing(subject):
    """Both branches of the wrapper's `cond` return the same types; clean batches pass through."""
    visited = subject.run(
        subject.compiled_wrapped, subject.wrapped.init, subject.problem.batches[:3]
    )
    chex.assert_trees_all_close(
        visited[-1][0], subject.trajectory[3][0], **tolerance(jnp.float32, 500)
    )
    assert gnlin.metrics(visited[-1][1]).keys() == gnlin.metrics(subject.trajectory[3][1]).keys()


def test_recovers_from_a_nan_batch(subject):
    """A NaN batch moves no parameter, is noticed, and leaves nothing behind; the batches after it
    train on.
    """
    compiled, init = subject.case.guard(subject)
    clean = subject.problem.batches
    poisoned = {**clean[1], "x": clean[1]["x"].at[0, 0].set(jnp.nan)}
    visited = subject.run(compiled, init, (clean[0], poisoned, *clean[2:]))
    chex.assert_trees_all_equal(visited[2][0], visited[1][0])
    assert subject.case.notices_nan(visited[2][1], gnlin.metrics(visited[2][1]))
    chex.assert_tree_all_finite(visited[3:])
    assert subject.loss(visited[-1][0]) < subject.loss(visited[2][0])


# Parts of the parameters.


def visible(params):
    """Trains the readout and the hidden biases; the hidden weights are fixed."""
    return {"hidden": (False, True), "readout": {"w": True, "b": None}}


def labels(params):
    return jax.tree.map(lambda seen: "train" if seen else "freeze", visible(params))


@each_kind
def test_partition_solves_the_visible_problem(subject):
    """The same parameters as the transform on the problem whose only parameters are the visible
    ones.
    """
    objective, whole, batches = (
        subject.problem.objective,
        subject.problem.params,
        subject.problem.batches[:3],
    )
    partition = optax.partition({"train": subject.tx, "freeze": optax.set_to_zero()}, labels)
    compiled = jax.jit(make_step(partition, objective, with_whole_tree(subject.case.extras)))
    visited = subject.run(compiled, partition.init, batches)
    assert compiled._cache_size() == 1
    assert subject.case.metrics <= gnlin.metrics(visited[-1][1]).keys()

    def rebuild(part):
        return {
            "hidden": (whole["hidden"][0], part["bias"]),
            "readout": {"w": part["w"], "b": None},
        }

    restricted = dataclasses.replace(
        objective, model=lambda part, batch: objective.model(rebuild(part), batch)
    )
    tx = subject.case.build(restricted)
    step = jax.jit(make_step(tx, restricted, subject.case.extras))
    part = {"bias": whole["hidden"][1], "w": whole["readout"]["w"]}
    opt_state = tx.init(part)
    for batch in batches:
        part, opt_state = step(part, opt_state, batch)
    chex.assert_trees_all_close(visited[-1][0], rebuild(part), **tolerance(jnp.float32, 500))


def test_masked_without_the_whole_tree_is_named(subject):
    params = subject.start()
    tx = optax.masked(subject.tx, visible)
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match=r"MaskedNode.*all_params=params"):
        tx.update(params, opt_state, params, batch=subject.problem.batches[0])


# Precision and convergence, on linear models: the arithmetic of a transform does not depend on the
# model.

PRECISIONS = {
    "bfloat16": Dtypes(jnp.bfloat16, jnp.bfloat16, wide_loss=False),
    "mixed": Dtypes(jnp.bfloat16, jnp.float32),
    "float64": Dtypes(jnp.float64, jnp.float64, x64=True),
    "float32-among-float64": Dtypes(jnp.float32, jnp.float32, x64=True),
}


def precise_step(subject, precision):
    """``(step, problem, tx)``; the step also returns updates and loss."""
    problem = logistic_regression(precision)
    objective = problem.objective
    tx = subject.case.build(objective)

    def step(params, opt_state):
        batch = problem.batches[0]
        value, grads = objective.value_and_grad(params, batch)
        extras = subject.case.extras(value, grads, params, batch, objective)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state, updates, value

    return step, problem, tx


@each_kind
def test_descends_in_bfloat16(subject):
    """The loss goes down, and no step recompiles. Above all is float32; dense oracles elsewhere are
    in float64.
    """
    step, problem, tx = precise_step(subject, PRECISIONS["bfloat16"])
    params, opt_state = problem.params, tx.init(problem.params)
    compiled, losses = jax.jit(step), []
    for _ in range(4):
        params, opt_state, updates, value = compiled(params, opt_state)
        losses.append(float(value))
    assert compiled._cache_size() == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(problem.params, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(problem.params, updates)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
def test_keeps_dtypes(subject, precision):
    """Updates, parameters and state have the dtypes they came with; known without compiling."""
    with enable_x64(precision.x64):
        step, problem, tx = precise_step(subject, precision)
        before = tx.init(problem.params)
        params, after, updates, _ = jax.eval_shape(step, problem.params, before)
        chex.assert_trees_all_equal_shapes_and_dtypes(problem.params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(problem.params, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


def test_solves_linear_regression_and_jit_changes_nothing(subject):
    """The first update is also computed without `jit`, and without the gradient that no transform
    here needs.
    """
    problem, solution = linear_regression()
    objective, start, batch = problem.objective, problem.params, problem.batches[0]
    tx = subject.case.build(objective)
    compiled = jax.jit(make_step(tx, objective, subject.case.extras))
    params, opt_state = compiled(start, tx.init(start), batch)
    updates, _ = tx.update(None, tx.init(start), start, batch=batch)
    chex.assert_trees_all_close(
        optax.apply_updates(start, updates), params, **tolerance(jnp.float32, 50)
    )

    for _ in range(subject.case.convex_steps - 1):
        params, opt_state = compiled(params, opt_state, batch)
    before, after = (jnp.linalg.norm(point["w"] - solution["w"]) for point in (start, params))
    assert after <= subject.case.convex_accuracy * before

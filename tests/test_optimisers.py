"""Contestants as the transforms that they stand for, and the search behind prox-linear."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from problems import tolerance

import gnlin
from gnlin.compare.entrants import optimisers
from gnlin.compare.entrants.contestants import CONTESTANTS
from gnlin.compare.entrants.entry import parse
from gnlin.compare.tasks.regression import diabetes
from gnlin.compare.tasks.text import chars

has_dimensions = pytest.mark.skipif(
    not optimisers._MUON_HAS_DIMENSIONS, reason="this Muon knows no stacks"
)


@pytest.fixture(autouse=True)
def _third_party():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def problem():
    """Characters, with parameters and a batch."""
    task = chars()
    return task, task.init(jax.random.key(0)), jax.tree.map(lambda leaf: leaf[:8], task.train)


def moved(word, task, params, batch):
    """The change of the parameters in the first step."""
    entry = parse(word)
    method = entry.method(task, entry.grid[0])

    @jax.jit
    def run(params):
        state = method.init(params, batch, jax.random.key(0))
        return method.step(params, state, batch, jax.random.key(0))[0]

    return jax.tree.map(jnp.subtract, run(params), params)


@has_dimensions
@pytest.mark.parametrize("word", ["muon:ends=muon", "muon"])
def test_muon_moves_each_matrix_of_a_stack_as_if_alone(word, problem):
    task, params, batch = problem
    ours = moved(word, task, params, batch)
    grads = jax.grad(task.objective.value)(params, batch)
    alone = {
        (name, block): leaf[block]
        for name, leaf in grads["blocks"].items()
        for block in range(2)
        if leaf.ndim == 3
    }
    tx = optax.contrib.muon(parse(word).grid[0])
    expected, _ = jax.jit(tx.update)(alone, tx.init(alone), alone)
    assert len(expected) == 8
    for (name, block), update in expected.items():
        np.testing.assert_allclose(
            ours["blocks"][name][block], update, **tolerance(jnp.float32, 1000), err_msg=name
        )


@has_dimensions
def test_muon_leaves_the_ends_of_a_transformer_to_adam(problem):
    task, params, batch = problem
    ours, all_muon = (moved(word, task, params, batch) for word in ("muon", "muon:ends=muon"))
    tx = optax.adam(parse("muon").grid[0], nesterov=True)
    start = jax.grad(task.objective.value)(params, batch)
    first, _ = tx.update(start, tx.init(params))
    for name in ("embedding", "positions", "output"):
        # Small gradients, whose direction rounding decides, are left out.
        seen = np.abs(start[name]) > 1e-5
        np.testing.assert_allclose(ours[name][seen], first[name][seen], rtol=1e-2)
        assert np.abs(all_muon[name] - first[name]).max() > 0.5 * np.abs(first[name]).max()


def test_an_older_muon_is_a_reason_where_matrices_are_stacked(problem, monkeypatch):
    monkeypatch.setattr(optimisers, "_MUON_HAS_DIMENSIONS", False)
    assert CONTESTANTS["muon"].reason_unfit(diabetes()) is None
    assert "pip install --upgrade optax" in str(CONTESTANTS["muon"].reason_unfit(problem[0]))
    with pytest.raises(ValueError, match="neither stacks of matrices"):
        parse("prox-linear:inner=muon").method(problem[0], 0.01)


def test_the_search_behind_prox_linear_shortens_a_step_that_raises_the_loss():
    """One inner step of Adam moves every number by the rate, which is far too much here."""
    task = diabetes()
    params, batch = task.init(jax.random.key(0)), task.train
    start = float(task.objective.value(params, batch))

    def step_of(word):
        method = parse(word).method(task, 1.0)
        state = method.init(params, batch, jax.random.key(0))
        new, _ = jax.jit(method.step)(params, state, batch, jax.random.key(0))
        step = optax.tree.sub(new, params)
        return float(task.objective.value(new, batch)), optax.tree.norm(step)

    loss, length = step_of("prox-linear:steps=1")
    searched, shorter = step_of("prox-linear:steps=1,line_search=yes")
    assert searched < start < loss
    halvings = np.log2(length / shorter)
    assert halvings == pytest.approx(round(float(halvings)), abs=0.01)
    assert 1 <= round(float(halvings)) <= 10


GAUSS_NEWTON = [
    ("gn", 0.1, lambda objective: gnlin.gauss_newton(objective)),
    (
        "gn",
        10.0,
        lambda objective: gnlin.gauss_newton(
            objective,
            damping=gnlin.GainRatio(10.0, minimum=10.0, relative=True, minimum_again=0.1),
        ),
    ),
    (
        "gn:step=subspace,refresh=1",
        1e-3,
        lambda objective: gnlin.gauss_newton(
            objective,
            damping=gnlin.GainRatio(1e-2, minimum=1e-3),
            solver=gnlin.Kronecker(),
            step=gnlin.Subspace(),
        ),
    ),
    (
        "gn-eigen",
        0.3,
        lambda objective: gnlin.gauss_newton(
            objective,
            solver=gnlin.Eigenbasis(),
            step=gnlin.Momentum(0.0, every=10, check=10),
            learning_rate=0.3,
        ),
    ),
]


@pytest.mark.parametrize(("word", "value", "make"), GAUSS_NEWTON)
def test_gauss_newton_is_the_transform_that_a_user_would_make(word, value, make):
    """On batches that change, and then on one that comes again: λ falls as far as it may."""
    task = diabetes()
    method, tx = parse(word).method(task, value), make(task.objective)
    size = len(jax.tree.leaves(task.train)[0]) // 4
    order = [0, 1, 2, 3, 0, 1, *[2] * 10]

    def ours(params, state, batch):
        return method.step(params, state, batch, jax.random.key(0))

    def theirs(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    start = task.init(jax.random.key(0))
    ends = []
    for step, state in (
        (jax.jit(ours), method.init(start, task.train, jax.random.key(0))),
        (jax.jit(theirs), tx.init(start)),
    ):
        params = start
        for number in order:
            part = slice(number * size, (number + 1) * size)
            batch = jax.tree.map(lambda leaf, part=part: leaf[part], task.train)
            params, state = step(params, state, batch)
        ends.append((params, gnlin.metrics(state)["damping"]))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, **tolerance(jnp.float32, 1000)),
        *ends,
    )


def test_gauss_newton_names_its_units_by_its_step():
    assert parse("gn").grid == (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    old = parse("gn:step=subspace,refresh=1")
    assert old.grid == (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    assert old.label == "gn:step=subspace,refresh=1"

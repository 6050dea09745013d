"""Anchors that move when the linearisation no longer holds, and layers that move at their own pace,
in plain loops.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from problems import classifier, third_party

import gnlin
from gnlin import LayerPeriods, RelativeGap

STEPS = 24


def model(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["features"]["w"] + params["features"]["b"][None, :])
    return jnp.tanh(hidden @ params["middle"]) @ params["readout"]


def loss(outputs, batch):
    losses = jax.nn.logsumexp(outputs, axis=-1) - jnp.sum(outputs * batch["y"], axis=-1)
    return jnp.mean(losses)


OBJECTIVE = gnlin.Objective(model, loss)


def start():
    return {
        "features": {"w": oracles.normal(3, 4, seed=1), "b": oracles.normal(4, seed=2)},
        "middle": oracles.normal(4, 4, seed=3),
        "readout": oracles.normal(4, 3, seed=4),
    }


def batches(steps=STEPS):
    labels = jax.nn.one_hot(jnp.arange(8) % 3, 3, dtype=float)
    return [{"x": oracles.normal(8, 3, seed=10 + count), "y": labels} for count in range(steps)]


def trained(tx, steps=STEPS, params=None):
    """Iterates and states after each step."""
    params = start() if params is None else params
    state, visited = tx.init(params), []
    update = jax.jit(lambda state, params, batch: tx.update(None, state, params, batch=batch))
    for batch in batches(steps):
        updates, state = update(state, params, batch)
        params = optax.apply_updates(params, updates)
        visited.append((params, state))
    return visited


def flat(params):
    return np.asarray(ravel_pytree(params)[0])


# When the anchor moves.


def gap_by_hand(anchor, params, batch):
    return float(_gap(anchor, params, batch))


@jax.jit
def _gap(anchor, params, batch):
    vector, unravel = ravel_pytree(anchor)
    jacobian = jax.jacfwd(lambda v: model(unravel(v), batch).ravel())(vector)
    moved = jacobian @ (ravel_pytree(params)[0] - vector)
    off = model(params, batch).ravel() - model(anchor, batch).ravel() - moved
    return jnp.linalg.norm(off) / jnp.linalg.norm(moved)


@pytest.mark.parametrize(
    "rule",
    [
        RelativeGap(0.2, patience=1),
        RelativeGap(0.1, patience=2, longest=7),
        RelativeGap(0.1, patience=2, every=3),
    ],
    ids=str,
)
def test_the_anchor_moves_where_two_loops_say(rule, x64):
    inner = third_party(optax.adam(0.05))
    path = trained(optax.chain(gnlin.linearise_gradients(OBJECTIVE, rule), inner))
    params, state, visited = start(), inner.init(start()), []

    @jax.jit
    def step(params, state, anchor, batch):
        _, grads = gnlin.linearised_value_and_grad(OBJECTIVE)(params, anchor, batch)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    anchor, age, exceeded, moves = params, None, 0, 0
    for batch in batches():
        stale = (
            age is None or exceeded >= rule.patience or (rule.longest and age + 1 >= rule.longest)
        )
        if stale:
            anchor, age, exceeded, moves = params, 0, 0, moves + 1
        else:
            age += 1
        if age and age % rule.every == 0:
            exceeded = exceeded + 1 if gap_by_hand(anchor, params, batch) > rule.limit else 0
        params, state = step(params, state, anchor, batch)
        visited.append((params, moves))
    assert 2 < moves < STEPS - 4
    for (found, opt_state), (expected, count) in zip(path, visited, strict=True):
        np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9, atol=1e-9)
        assert gnlin.metrics(opt_state)["linearise/refreshes"] == count


def test_what_the_last_look_found_is_in_the_metrics(x64):
    path = trained(
        gnlin.iterative_linearisation(third_party(optax.sgd(0.1)), OBJECTIVE, RelativeGap(1e3)), 5
    )
    params, state = path[-2][0], path[-1][1]
    found = gnlin.metrics(state)
    assert found["linearise/gap"] == pytest.approx(
        gap_by_hand(gnlin.anchor(state), params, batches(5)[-1]), rel=1e-9
    )
    assert gnlin.metrics(path[0][1])["linearise/gap"] == 0  # at the anchor


@pytest.mark.parametrize(
    ("rate", "dtype"),
    [(1.0, "float32"), (1e-4, "float32"), (1e-7, "float32"), (0.1, "bfloat16"), (0.1, "float16")],
)
def test_a_linear_model_is_never_linearised_again(rate, dtype):
    """Not for rounding either."""
    objective = gnlin.Objective(lambda p, b: b["x"] @ p, loss)
    params = jnp.asarray(oracles.normal(3, 3, seed=1), dtype)
    tx = optax.chain(
        gnlin.linearise_gradients(objective, RelativeGap(0.01)), third_party(optax.sgd(rate))
    )
    data = jax.tree.map(lambda leaf: leaf.astype(dtype), batches(1)[0])
    step = jax.jit(lambda params, state: tx.update(None, state, params, batch=data))
    state = tx.init(params)
    for _ in range(100):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert gnlin.metrics(state)["linearise/refreshes"] == 1


def test_a_network_that_overflows_away_from_its_anchor_comes_back():
    objective = gnlin.Objective.least_squares(lambda p: jnp.exp(100 * p))
    tx = gnlin.linearise_gradients(objective, RelativeGap(0.5, patience=1))
    params, update = jnp.zeros(1), jax.jit(tx.update)
    _, state = update(None, tx.init(params), params)
    _, state = update(None, state, params + 1)
    assert gnlin.metrics(state)["linearise/gap"] == jnp.inf
    _, state = update(None, state, params)
    assert gnlin.metrics(state)["linearise/refreshes"] == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"limit": 0.0}, ValueError, "`limit` must be positive; got 0.0"),
        ({"limit": "0.1"}, TypeError, "`limit` must be a number; got '0.1'"),
        (
            {"limit": 0.1, "patience": 0},
            ValueError,
            "`patience` must be an integer of at least 1; got 0",
        ),
        (
            {"limit": 0.1, "every": 1.5},
            ValueError,
            "`every` must be an integer of at least 1; got 1.5",
        ),
        (
            {"limit": 0.1, "longest": True},
            ValueError,
            "`longest` must be an integer of at least 1; got True",
        ),
        (
            {"limit": 0.1, "every": 4, "longest": 8},
            ValueError,
            "`longest` must be more than patience.*= 8.*; got 8",
        ),
        ({"limit": -1}, ValueError, "`limit` must be positive; got -1"),
        ({"limit": 0.1, "shortest": 3}, TypeError, "unexpected keyword argument 'shortest'"),
    ],
    ids=str,
)
def test_rules_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        RelativeGap(**options)


def test_a_rule_must_be_built():
    with pytest.raises(TypeError, match="`period` must be a record, not a class"):
        gnlin.linearise_gradients(OBJECTIVE, RelativeGap)


# Layers at their own pace.

LABELS = {"features": "features", "middle": "middle", "readout": "readout"}


def partly_linearised(anchor, exact, batch):
    """Flat parameters ↦ Q, the Jacobian of the linearised leaves materialised by reverse mode."""
    names = [name for name in anchor if name not in exact]

    def q(params):
        def outputs(chosen):
            return model({**params, **chosen}, batch)

        fixed = {name: anchor[name] for name in names}
        vector, unravel = ravel_pytree(fixed)
        jacobian = jax.jacrev(lambda v: outputs(unravel(v)))(vector)
        moved = jacobian @ (ravel_pytree({name: params[name] for name in names})[0] - vector)
        return loss(outputs(fixed) + moved, batch)

    return q


@pytest.mark.parametrize(
    "periods",
    [
        {"features": 5, "middle": 5, "readout": 5},
        {"features": 5, "middle": 5, "readout": 1},
        {"features": None, "middle": 1, "readout": 1},
        {"features": 2, "middle": 3, "readout": 1},
        {"features": 7, "middle": 2, "readout": None},
    ],
    ids=str,
)
def test_layers_move_at_their_own_pace(periods, x64):
    inner = optax.sgd(0.3, momentum=0.5)
    layers = LayerPeriods(periods, LABELS)
    path = trained(optax.chain(gnlin.linearise_gradients(OBJECTIVE, layers), third_party(inner)), 8)
    exact = {name for name, period in periods.items() if period == 1}
    params, state, anchor = start(), inner.init(start()), start()

    @jax.jit
    def step(params, state, anchor, batch):
        value, grads = jax.value_and_grad(partly_linearised(anchor, exact, batch))(params)
        updates, state = inner.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    for count, batch in enumerate(batches(8)):
        for name, period in periods.items():
            if period and count % period == 0:
                anchor[name] = params[name]
        value, params, state = step(params, state, anchor, batch)
        np.testing.assert_allclose(flat(path[count][0]), flat(params), rtol=1e-9, atol=1e-9)
        found = gnlin.metrics(path[count][1])
        assert found["linearise/loss"] == pytest.approx(float(value), rel=1e-12)
        for name, period in periods.items():
            assert found[f"linearise/refreshes/{name}"] == 1 + (count // period if period else 0)
            assert found[f"linearise/age/{name}"] == (count % period if period else count)


def test_labels_of_lists_and_of_upper_parts():
    params = [{"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.ones(2), "b": None}]
    layers = LayerPeriods({0: 2, 1: 1}, [0, 1])
    assert layers.label_of_leaves(params) == [0, 0, 1]


def test_one_pace_for_all_is_an_ordinary_period(x64):
    same = [
        gnlin.iterative_linearisation(
            third_party(optax.adam(0.1)), OBJECTIVE, period, loss_model="quadratic"
        )
        for period in (
            LayerPeriods({True: 3, False: 3}, {"features": True, "middle": False, "readout": True}),
            3,
        )
    ]
    for (a, _), (b, _) in zip(trained(same[0], 7), trained(same[1], 7), strict=True):
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-9)


def test_a_mask_of_nothing_linearises_nothing(x64):
    mask = jax.tree.map(lambda leaf: False, start())
    layers = [
        LayerPeriods({True: None, False: 1}, labels) for labels in (mask, lambda params: mask)
    ]
    for each in layers:
        tx = optax.chain(gnlin.linearise_gradients(OBJECTIVE, each), third_party(optax.sgd(0.3)))
        for (a, _), (b, _) in zip(trained(tx, 3), trained(plain(optax.sgd(0.3)), 3), strict=True):
            np.testing.assert_allclose(flat(a), flat(b), rtol=1e-12)


def plain(inner):
    return optax.chain(gnlin.linearise_gradients(OBJECTIVE, 1), third_party(inner))


def test_layers_that_stay_as_they_are(x64):
    """Frozen by Optax: the rest is linearised about them."""
    layers = LayerPeriods(
        {"move": 4, "stay": None}, {"features": "stay", "middle": "move", "readout": "move"}
    )
    freeze = optax.partition(
        {"move": third_party(optax.sgd(0.2)), "stay": optax.set_to_zero()}, layers.labels
    )
    path = trained(optax.chain(gnlin.linearise_gradients(OBJECTIVE, layers), freeze), 6)
    frozen = start()["features"]

    def rest(params, batch):
        return model({"features": frozen, **params}, batch)

    objective = gnlin.Objective(rest, loss)
    params = {name: start()[name] for name in ("middle", "readout")}
    iterates = oracles.iterative_linearisation(objective, optax.sgd(0.2), params, batches(6), 4)
    for (found, _), expected in zip(path, iterates, strict=True):
        np.testing.assert_array_equal(flat(found["features"]), flat(frozen))
        np.testing.assert_allclose(
            flat({name: found[name] for name in params}), expected, rtol=1e-9, atol=1e-9
        )


def test_predictions_are_those_of_the_model_that_is_trained(x64):
    layers = LayerPeriods({"features": 4, "middle": 2, "readout": 1}, LABELS)
    path = trained(gnlin.linearise_gradients(OBJECTIVE, layers), 3)
    state, theta, batch = path[-1][1], start(), batches(4)[-1]
    anchor = gnlin.anchor(state)
    # After three updates the middle's anchor has a step to go, the features' one has one too.
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(9 * leaf), theta)
    predict = jax.jit(lambda state: gnlin.predict(OBJECTIVE, state, moved, batch))
    value = OBJECTIVE.loss(predict(state), batch)
    expected = jax.jit(lambda: partly_linearised(anchor, {"readout"}, batch)(moved))()
    assert value == pytest.approx(float(expected), rel=1e-12)
    # And after four both start afresh.
    update = jax.jit(gnlin.linearise_gradients(OBJECTIVE, layers).update)
    _, state = update(None, state, moved, batch=batch)
    found = predict(state)
    np.testing.assert_allclose(found, model(moved, batch), rtol=1e-12)


@pytest.mark.parametrize(
    "period",
    [2, LayerPeriods({"features": 2, "middle": 1, "readout": 3}, LABELS)],
    ids=["one", "own"],
)
def test_predictions_behind_a_mask(period, x64):
    """An anchor that is about to move moves in what is seen; the rest is where it is."""
    visible = {"features": True, "middle": True, "readout": False}
    tx = optax.masked(gnlin.linearise_gradients(OBJECTIVE, period), visible)
    params, state = start(), tx.init(start())
    batch = batches(1)[0]

    @jax.jit
    def step(params, state):
        grads = jax.grad(OBJECTIVE.value)(params, batch)
        return tx.update(grads, state, params, batch=batch, all_params=params)[1]

    predict = jax.jit(lambda params, state: gnlin.predict(OBJECTIVE, state, params, batch))
    for count in range(4):
        found = predict(params, state)
        if count % 2 == 0:  # the anchor of all that is linearised moves at the next update
            np.testing.assert_allclose(found, model(params, batch), rtol=1e-12)
        else:
            assert np.max(np.abs(found - model(params, batch))) > 1e-6
        state = step(params, state)
        params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(9 * leaf), params)


def test_labels_that_are_equal_are_the_same(x64):
    """A mask, say, whose periods are given for 1 and 0."""
    mask = {"features": True, "middle": False, "readout": False}
    paths = [
        trained(gnlin.linearise_gradients(OBJECTIVE, LayerPeriods(periods, mask)), 5)
        for periods in ({True: 4, False: 1}, {1: 4, 0: 1})
    ]
    chex.assert_trees_all_equal(paths[0][-1][0], paths[1][-1][0])
    assert gnlin.metrics(paths[1][-1][1])["linearise/refreshes/1"] == 2


def test_bad_layers():
    with pytest.raises(ValueError, match=r"`periods` must map each label to its period; got \{\}"):
        LayerPeriods({}, LABELS)
    with pytest.raises(
        ValueError, match=r"`period` must be at least 1; got 0.*of 'features' in `periods`"
    ):
        LayerPeriods({"features": 0}, LABELS)
    with pytest.raises(
        TypeError, match=r"`periods` of layers must be integers.*RelativeGap.* for 'features'"
    ):
        LayerPeriods({"features": RelativeGap(0.1)}, LABELS)
    with pytest.raises(
        ValueError, match=r"`periods` has labels that are written alike: \[1, '1'\]"
    ):
        LayerPeriods({1: 2, "1": 3}, LABELS)
    layers = LayerPeriods({"features": 2, "readout": 1}, LABELS)
    with pytest.raises(ValueError, match=r"`labels` has 'middle', which `periods` lacks"):
        gnlin.linearise_gradients(OBJECTIVE, layers).init(start())
    with pytest.raises(TypeError, match="`labels` must be names, numbers or other constants"):
        gnlin.linearise_gradients(OBJECTIVE, LayerPeriods({"a": 2}, jnp.ones(2))).init(start())
    elsewhere = LayerPeriods({"a": 2}, {"somewhere": "a"})
    with pytest.raises(
        ValueError, match="`labels` must be a tree like the parameters, or of their upper part"
    ):
        gnlin.linearise_gradients(OBJECTIVE, elsewhere).init(start())
    with pytest.raises(
        ValueError, match="`line_search` wants cycles that end for all layers at once"
    ):
        gnlin.iterative_linearisation(optax.sgd(0.1), OBJECTIVE, layers, line_search=(1.0,))
    with pytest.raises(
        ValueError, match="`reset_inner` wants cycles that end for all layers at once"
    ):
        gnlin.iterative_linearisation(optax.sgd(0.1), OBJECTIVE, layers, reset_inner=True)


def test_line_searches_of_the_inner_optimiser_see_the_partly_linearised_loss():
    problem = classifier()
    layers = LayerPeriods({"hidden": 3, "readout": 1}, {"hidden": "hidden", "readout": "readout"})
    tx = gnlin.iterative_linearisation(third_party(optax.lbfgs()), problem.objective, layers)
    params, batch = problem.params, problem.batches[0]
    state, before = tx.init(params), float(problem.objective.value(params, batch))
    step = jax.jit(lambda params, state: tx.update(None, state, params, batch=batch))
    for _ in range(6):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert float(problem.objective.value(params, batch)) < 0.5 * before

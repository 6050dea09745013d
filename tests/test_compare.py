import concurrent.futures
import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import gnlin
from gnlin.compare import (
    CONTESTANTS,
    TASKS,
    Contestant,
    Method,
    cli,
    entries_of,
    optax_contestant,
    run,
)
from gnlin.compare.entrants.contestants import DEFAULT
from gnlin.compare.entrants.entry import parse
from gnlin.compare.runs.cost import flops, gradient_flops
from gnlin.compare.runs.jobs import _key, make
from gnlin.compare.runs.records import SCHEMA, Records, RecordsError, read
from gnlin.compare.runs.study import Study
from gnlin.compare.runs.trial import Program, metered_step
from gnlin.compare.tasks import describe
from gnlin.compare.tasks.handwriting import digits

# Of the others one wants a small network and has a test of its own.
RUNNABLE = [
    name for name, entry in CONTESTANTS.items() if entry.family != "peers" and name != "lm-trust"
]


@pytest.fixture(autouse=True)
def _strict():
    """Optax's own optimisers are among the contestants: they need the usual promotion of dtypes."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def task():
    return digits()


@pytest.fixture(scope="module")
def tiny(task):
    """A few steps on a few digits."""

    def part(batch, size):
        return jax.tree.map(lambda leaf: leaf[:size], batch)

    return dataclasses.replace(
        task,
        train=part(task.train, 40),
        held_out=part(task.held_out, 20),
        batch_size=16,
        work=40.0,
        target=0.5,
    )


def program(task, word):
    return Program(task, parse(word), task.work, gradient_flops(task))


# Words to entries.


def test_options_are_said_in_words():
    entry = parse("il:period=never,inner=sgd,line_search=yes")
    assert entry.options["period"] is None
    assert entry.options["inner"] == "sgd"
    assert entry.options["line_search"] is True
    assert entry.options["batch"] == "mini"
    assert entry.label == "il:period=never,inner=sgd,line_search=yes"
    assert entry.grid == CONTESTANTS["sgd"].grid  # of the inner optimiser
    assert parse("il").grid == CONTESTANTS["adam"].grid
    assert parse(entry.label) == entry
    assert parse("adam:learning_rate=0.01").grid == (0.01,)
    assert parse("adam:learning_rate=0.01").label == "adam:learning_rate=0.01"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adm", "unknown contestant 'adm'; did you mean 'adam'?"),
        ("zzz", "unknown contestant 'zzz'; known: sgd, adam"),
        ("il:perid=3", "il has no option 'perid'; did you mean 'period'?"),
        ("il:period=0", "il:period must be a whole number of at least 1, or never; got '0'"),
        ("il:period=2.5", "il:period must be a whole number"),
        ("il:inner=adm", "il:inner must be one of adam, sgd, adamw, muon; got 'adm'"),
        ("il:period", "il:period: write option=value"),
        ("il:reset=maybe", "il:reset must be yes or no; got 'maybe'"),
        (
            "sgd:batch=0",
            "sgd:batch must be mini .the task's., full, or a number of examples; got '0'",
        ),
        ("gn:damping=small", "gn:damping must be a number of at least 0; got 'small'"),
        ("gn-cg:rtol=nan", "gn-cg:rtol must be a number; got 'nan'"),
        ("adam:learning_rate=inf", "adam:learning_rate must be a number of at least 0; got 'inf'"),
        ("peers:batch=full", "'peers' is a family, which takes no options"),
    ],
)
def test_what_is_not_known_is_an_error_that_suggests(word, message):
    with pytest.raises(ValueError, match=message):
        entries_of([word])


def test_sweeps_are_crossed_for_those_that_have_the_option():
    labels = [
        entry.label
        for entry in entries_of(
            ["adam", "il"], {"period": ["1", "never"], "inner": ["sgd", "adam"]}
        )
    ]
    assert labels == [
        "adam",
        "il:period=1,inner=sgd",
        "il:period=1",
        "il:period=never,inner=sgd",
        "il:period=never",
    ]
    assert [entry.label for entry in entries_of([], {"period": ["1", "4"]})] == [
        "il:period=1",
        "il:period=4",
    ]
    assert [entry.contestant.name for entry in entries_of([], {"damping": ["1"]})] == [
        "gn",
        "gn-cg",
        "lm",
    ]
    assert [entry.grid for entry in entries_of(["gn"], {"damping": ["1", "2"]})] == [(1.0,), (2.0,)]
    with pytest.raises(
        ValueError,
        match="none of the contestants has an option 'periods' to sweep; did you mean 'period'",
    ):
        entries_of(["il"], {"periods": ["1"]})


def test_contestants_of_ones_own_are_swept_and_may_not_share_a_name():
    lion = optax_contestant("lion", optax.lion, (0.001, 0.01))
    assert [entry.label for entry in entries_of([lion])] == ["lion"]
    swept = entries_of([lion], {"learning_rate": ["0.1", "0.2"]})
    assert [(entry.label, entry.grid) for entry in swept] == [
        ("lion:learning_rate=0.1", (0.1,)),
        ("lion:learning_rate=0.2", (0.2,)),
    ]
    with pytest.raises(
        ValueError, match="two contestants are called 'lion'; give one another name"
    ):
        entries_of([lion, optax_contestant("lion", optax.adam, (0.1,))])
    close = entries_of(["adam:learning_rate=0.01", "adam:learning_rate=0.01000001"])
    assert len({entry.label for entry in close}) == 2


def test_families_stand_for_their_members():
    family = {"il", "il-gap", "prox-linear", "gn", "gn-eigen", "gn-cg", "lm", "lm-trust"}
    assert {entry.contestant.name for entry in entries_of(["gnlin"])} == family
    assert [entry.label for entry in entries_of([])] == list(DEFAULT)
    assert len(entries_of(["adam", "adam"])) == 1


def test_everyone_is_tuned_over_five_values():
    assert {name: len(parse(name).grid) for name in CONTESTANTS} == {
        name: 1 if name == "jaxopt-gn" else 5 for name in CONTESTANTS
    }


# Cost.


def test_loops_of_known_length_and_factorisations_are_counted():
    matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    product = 2 * 64**3

    def repeated(length, **how):
        return lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=length, **how)[0]

    def nested(a):
        return jax.lax.fori_loop(0, 3, lambda _, c: repeated(4)(c), a)

    assert flops(repeated(1), matrix) == pytest.approx(product, rel=0.01)
    assert flops(repeated(7), matrix) == pytest.approx(7 * product, rel=0.01)
    assert flops(repeated(7, unroll=2), matrix) == pytest.approx(7 * product, rel=0.01)
    assert flops(repeated(7, unroll=True), matrix) == pytest.approx(7 * product, rel=0.01)
    assert flops(nested, matrix) == pytest.approx(12 * product, rel=0.01)

    value_alone = lambda a: jax.value_and_grad(lambda b: repeated(7)(b).sum())(a)[0]  # noqa: E731
    assert flops(value_alone, matrix) == pytest.approx(7 * product, rel=0.02)
    tall = jax.ShapeDtypeStruct((300, 100), jnp.float32)
    assert flops(lambda a: jnp.linalg.qr(a, mode="r"), tall) == pytest.approx(
        4 * 100**2 * (300 - 100 / 3), rel=0.05
    )
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    assert flops(jnp.linalg.cholesky, square) == pytest.approx(512**3 / 3, rel=0.05)


def test_an_adam_step_costs_one_gradient_and_a_linearised_one_five_thirds(task):
    unit = gradient_flops(task)

    def cost(word):
        meter = metered_step(task, parse(word))
        assert not meter.varies
        return meter.flops / unit

    # Adam's own arithmetic is 15 operations for each parameter against 6 × 128 for the gradient.
    assert cost("adam") == pytest.approx(1.0, abs=0.025)
    # The first layer passes no gradient on to the data, which saves a little of the linearised step
    # as of the gradient.
    assert cost("il:period=16") == pytest.approx(5 / 3, rel=0.04)
    assert cost("sgd:batch=full") == pytest.approx(1437 / 128, rel=0.01)
    assert cost("sgd:batch=256") == pytest.approx(2, rel=0.01)


def test_inner_steps_of_prox_linear_are_all_counted(task):
    """Each is a product: a push-forward and a pull-back."""
    few, many = (metered_step(task, parse(f"prox-linear:steps={steps}")).flops for steps in (4, 24))
    # A gradient is 3 products per layer less the one for the data; these are 4 less one for each.
    widths = np.array([64 * 128, 128 * 64, 64 * 10])
    expected = (4 * widths.sum() - 2 * widths[0]) / (3 * widths.sum() - widths[0])
    assert (many - few) / 20 / gradient_flops(task) == pytest.approx(expected, rel=0.1)


# Runs.


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_contestant_trains_within_its_budget(tiny, name):
    trained = program(dataclasses.replace(tiny, work=200.0), name)
    number = parse(name).grid[1]
    first = trained.run(number, seed=0)
    curve = first["curve"]
    assert first["status"] == "finished"
    assert curve["step"][0] == curve["seconds"][0] == 0
    assert curve["cost"][0] == pytest.approx(
        2.5 if name == "lbfgs" else 0, abs=0.5
    )  # its first value and gradient
    assert curve["step"][-1] == first["steps"]
    assert all(np.diff(curve["cost"]) > 0)
    dearest = max(np.diff(curve["cost"]) / np.diff(curve["step"]))
    least = 200 - trained.cycle * max(
        dearest, first["cost_per_step"]
    )  # what is left does not suffice for a cycle
    assert least <= curve["cost"][-1] <= 200 + 0.2 * dearest
    assert curve["loss"][-1] < curve["loss"][0]
    assert all(0 <= accuracy <= 100 for accuracy in curve["quality"])
    if name not in {"il", "il-gap"}:  # whose loss is the linearised model's
        assert curve["loss"] == curve["network_loss"]
    again = trained.run(number, seed=0)
    assert {**again["curve"], "seconds": []} == {**curve, "seconds": []}
    assert trained.run(number, seed=1)["curve"]["loss"] != curve["loss"]


def test_a_run_of_a_task_that_stops_ends_where_it_first_finds_the_target(tiny):
    long = program(dataclasses.replace(tiny, work=200.0), "adam").run(0.016, seed=0)
    target = sorted(long["curve"]["loss"])[len(long["curve"]["loss"]) // 2]
    stopping = dataclasses.replace(tiny, work=200.0, target=target, stops=True)
    short = program(stopping, "adam").run(0.016, seed=0)
    losses = short["curve"]["loss"]
    assert losses[-1] <= target < min(losses[:-1])
    assert losses == long["curve"]["loss"][: len(losses)]
    assert short["status"] == "finished"
    assert short["steps"] < long["steps"]


def test_the_model_being_trained_is_the_linearised_one(tiny):
    rate = 0.016
    adam = optax.adam(rate)
    start = tiny.init(jax.random.key(0))
    record = program(tiny, "il:period=never").run(rate, seed=0)

    @jax.jit
    def step(params, state, batch):
        _, grads = gnlin.linearised_value_and_grad(tiny.objective)(params, start, batch)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = start, adam.init(start)
    for indices in tiny.batches(0, record["steps"], 16):
        params, state = step(
            params, state, jax.tree.map(lambda leaf, indices=indices: leaf[indices], tiny.train)
        )
    outputs = gnlin.linearise(tiny.objective, start, tiny.train).predict(params)
    curve = record["curve"]
    np.testing.assert_allclose(
        curve["loss"][-1], tiny.objective.loss_of(outputs, tiny.train), rtol=1e-3
    )
    np.testing.assert_allclose(
        curve["network_loss"][-1], tiny.objective.value(params, tiny.train), rtol=1e-3
    )
    held_out = gnlin.linearise(tiny.objective, start, tiny.held_out).predict(params)
    np.testing.assert_allclose(
        curve["quality"][-1], 100 * (held_out.argmax(-1) == tiny.held_out["y"]).mean(), rtol=1e-6
    )


def test_evaluation_in_pieces_is_that_of_the_whole(tiny, monkeypatch):
    whole = program(tiny, "il:period=never").run(0.016, seed=0)["curve"]
    monkeypatch.setattr("gnlin.compare.runs.evaluation._WHOLE", 39)
    monkeypatch.setattr(
        "gnlin.compare.runs.evaluation._PIECE", 16
    )  # of 40 examples, so that one piece is smaller
    pieces = program(tiny, "il:period=never").run(0.016, seed=0)["curve"]
    for name in ("loss", "quality", "network_loss", "network_quality"):
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-4)


def test_batches_are_a_permutation_each_epoch(task):
    batches = task.batches(3, 30, 128)
    assert batches.shape == (30, 128)
    assert len(np.unique(batches[:11])) == 11 * 128
    assert not np.array_equal(batches[:11], batches[11:22])
    np.testing.assert_array_equal(batches[:5], task.batches(3, 5, 128))
    assert not np.array_equal(batches, task.batches(4, 30, 128))


def test_a_diverged_run_is_a_record_and_json_has_no_nan(tiny, tmp_path):
    runs = run(tiny, [optax_contestant("sgd", optax.sgd, (1e38, 3e38))], seeds=2, out=tmp_path)
    assert [record["status"] for record in runs] == ["diverged"] * 3
    assert "not finite after" in runs[0]["reason"]
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert parsed[0]["curve"]["loss"][-1] is None
    assert parsed[0]["environment"]["jax"] == jax.__version__
    assert math.isnan(read(tmp_path)[0]["curve"]["loss"][-1])


def test_what_fails_is_a_record_with_its_reason_and_the_others_go_on(tiny):
    def explode(rate):
        raise RuntimeError("out of\nluck")

    line = explode.__code__.co_firstlineno + 1
    absent = dataclasses.replace(
        CONTESTANTS["adam"], name="absent", reason_absent=lambda: "not installed; pip install it"
    )
    unfit = dataclasses.replace(
        CONTESTANTS["adam"], name="unfit", reason_unfit=lambda task: f"not for {task.name}"
    )
    runs = run(
        tiny,
        [optax_contestant("bad", explode, (1.0, 2.0)), absent, unfit, "adam:learning_rate=0.01"],
        seeds=1,
    )
    assert [(record["label"], record["status"], record["reason"]) for record in runs] == [
        ("bad", "failed", f"RuntimeError: out of luck ({__file__}, line {line})"),
        ("bad", "failed", f"RuntimeError: out of luck ({__file__}, line {line})"),
        ("absent", "failed", "not installed; pip install it"),
        ("unfit", "failed", "not for digits"),
        ("adam:learning_rate=0.01", "finished", ""),
    ]


def test_two_of_one_name_are_not_mistaken_for_each_other(tiny):
    losses = [
        run(tiny, [optax_contestant("x", make, (0.01,))], seeds=1)[0]["curve"]["loss"][-1]
        for make in (optax.sgd, optax.adam)
    ]
    assert losses[0] != losses[1]


def test_a_batch_that_the_task_cannot_give_is_a_reason(tiny):
    for task, size in (("diabetes", 8), (tiny, 41)):
        (record,) = run(task, [f"adam:learning_rate=0.01,batch={size}"], seeds=1)
        assert record["status"] == "failed"
        assert f"has no batches of {size}; leave out batch={size}" in record["reason"]


def test_an_optimiser_from_outside_need_not_tell_of_its_loops(tiny):
    """A line search that always turns twice evaluates the loss as often, and once to begin with."""

    def searching(rate):
        search = optax.scale_by_backtracking_linesearch(2, slope_rtol=0.99, decrease_factor=0.999)
        return optax.chain(optax.sgd(rate), search)

    (record,) = run(tiny, [optax_contestant("outside", searching, (1e-3,))], seeds=1)
    assert record["cost_per_step"] == pytest.approx(1 + 2 / 3, abs=0.4)


def test_steps_that_cost_less_than_they_look_spend_the_budget_too(tiny):
    """Many gradients, in a branch that is taken once in so many steps."""

    def build(many, often, task, options):
        adam = CONTESTANTS["adam"].build(task, options)

        def step(params, state, batch, key):
            def dear(params):
                def turn(_, moved):
                    return jax.tree.map(
                        lambda w, g: w + 1e-12 * g,
                        moved,
                        jax.grad(task.objective.value)(moved, batch),
                    )

                return jax.lax.fori_loop(0, many, turn, params)

            params = jax.lax.cond(
                state[0].count % often == often - 1, dear, lambda params: params, params
            )
            return adam.step(params, state, batch, key)

        return adam._replace(step=step)

    rare = Contestant(
        "rare",
        "",
        functools.partial(build, 9, 10),
        grid=(0.004,),
        options=CONTESTANTS["adam"].options,
    )
    (record,) = run(tiny, [rare], seeds=1)
    assert record["cost_per_step"] == pytest.approx(1 + 0.9, abs=0.4)
    assert abs(record["curve"]["cost"][-1] - tiny.work) < 10

    never = Contestant(
        "never", "", functools.partial(build, 39, 1000), grid=(0.004,), options=rare.options
    )
    (record,) = run(tiny, [never], seeds=1, work=4.0)
    assert 4 * tiny.work - 2 < record["curve"]["cost"][-1] <= 4 * tiny.work
    assert record["steps"] > 100  # and not the four that the dear ones would have been


def test_a_run_ends_with_a_whole_cycle_of_the_model_that_was_trained(tiny):
    """40 gradients are enough for 24 linearised steps: two cycles of 10, and no third."""
    rate = 0.004
    record = program(tiny, "il:period=10").run(rate, seed=0)
    assert record["steps"] == 20
    tx = gnlin.iterative_linearisation(optax.adam(rate), tiny.objective, 10)
    params = tiny.init(jax.random.key(0))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for indices in tiny.batches(0, 20, 16):
        batch = jax.tree.map(lambda leaf, indices=indices: leaf[indices], tiny.train)
        updates, state = update(None, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    outputs = gnlin.linearise(tiny.objective, gnlin.anchor(state), tiny.train).predict(params)
    curve = record["curve"]
    np.testing.assert_allclose(
        curve["loss"][-1], tiny.objective.loss_of(outputs, tiny.train), rtol=1e-3
    )
    np.testing.assert_allclose(
        curve["network_loss"][-1], tiny.objective.value(params, tiny.train), rtol=1e-3
    )
    assert curve["loss"][-1] != curve["network_loss"][-1]


def test_a_cycle_longer_than_the_budget_is_cut(tiny):
    record = program(tiny, "il:period=1000").run(0.004, seed=0)
    assert 40 - record["cost_per_step"] < record["curve"]["cost"][-1] <= 40


def test_an_untraced_method_runs_as_a_traced_one(tiny):
    def build(task, options):
        traced = CONTESTANTS["adam"].build(task, options)
        step = jax.jit(traced.step)
        return traced._replace(step=step, traced=False, flops=2 * gradient_flops(task))

    adam = CONTESTANTS["adam"]
    untraced = Contestant("untraced", "", build, grid=(0.004,), options=adam.options)
    (own,), (other,) = (
        run(tiny, [untraced], seeds=1),
        run(tiny, ["adam:learning_rate=0.004"], seeds=1),
    )
    assert own["cost_per_step"] == 2.0
    assert own["steps"] == 20
    assert own["compile_seconds"] > own["seconds"]
    losses = dict(zip(other["curve"]["step"], other["curve"]["loss"], strict=True))
    np.testing.assert_allclose(own["curve"]["loss"][-1], losses[20], rtol=1e-4)


def test_every_step_has_a_key_of_its_own(tiny):
    """The same ones in a traced run and in one that is not."""
    adam = CONTESTANTS["adam"]

    def noisy(task, options, traced):
        method = adam.build(task, options)

        def step(params, state, batch, key):
            params, state = method.step(params, state, batch, key)
            noise = 0.1 * jax.random.normal(key)
            return jax.tree.map(lambda leaf: leaf + noise.astype(leaf.dtype), params), state

        if traced:
            return method._replace(step=step)
        work = 2 * gradient_flops(task)
        return method._replace(step=jax.jit(step), traced=False, flops=work)

    losses = []
    for traced in (True, False):
        build = functools.partial(noisy, traced=traced)
        contestant = Contestant("noisy", "", build, grid=(0.004,), options=adam.options)
        (record,) = run(tiny, [contestant], seeds=1, work=4.0)
        losses.append(dict(zip(record["curve"]["step"], record["curve"]["loss"], strict=True)))
    common = sorted(losses[0].keys() & losses[1].keys())
    assert max(np.diff(common)) > 1  # some steps are made without a return to Python between them
    for step in common:
        np.testing.assert_allclose(losses[0][step], losses[1][step], rtol=1e-4)


def test_a_first_state_that_costs_more_than_the_budget_is_a_reason(tiny):
    (record,) = run(tiny, ["lbfgs:max_step=1"], seeds=1, work=0.05)
    assert record["status"] == "failed"
    assert re.match(
        r"its first state alone costs [23] gradient-equivalents of 2: raise --work",
        record["reason"],
    )


def test_steps_of_unknown_cost_do_not_overshoot_the_budget(tiny):
    """A loop that looks like a turn and makes as many as the budget has gradients."""

    def build(task, options):
        adam = CONTESTANTS["adam"].build(task, options)

        def step(params, state, batch, key):
            def turn(carry):
                number, params = carry
                grads = jax.grad(task.objective.value)(params, batch)
                return number + 1, jax.tree.map(
                    lambda leaf, grad: leaf - 1e-4 * grad, params, grads
                )

            params = jax.lax.while_loop(
                lambda carry: carry[0] < 40 + 0 * state[0].count, turn, (0, params)
            )[1]
            return adam.step(params, state, batch, key)

        return adam._replace(step=step)

    long = Contestant("long", "", build, grid=(0.004,), options=CONTESTANTS["adam"].options)
    (record,) = run(tiny, [long], seeds=1)
    assert record["steps"] == 1
    assert record["cost_per_step"] == pytest.approx(41, rel=0.05)


def test_a_reason_that_cannot_be_told_is_a_reason(tiny):
    def unfit(task):
        raise KeyError("layers")

    line = unfit.__code__.co_firstlineno + 1
    odd = dataclasses.replace(CONTESTANTS["adam"], name="odd", grid=(0.01,), reason_unfit=unfit)
    odd_record, adam = run(tiny, [odd, "adam:learning_rate=0.01"], seeds=1)
    assert (odd_record["status"], odd_record["reason"]) == (
        "failed",
        f"KeyError: 'layers' ({__file__}, line {line})",
    )
    assert adam["status"] == "finished"


def test_the_trust_region_leaves_large_networks(tiny):
    (record,) = run(tiny, ["lm-trust:radius=1"], seeds=1)
    assert record["status"] == "failed"
    assert record["reason"].startswith("it factorises a matrix of 17226 columns")


# Records.


@pytest.fixture(scope="module")
def three_runs(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("three")
    run(tiny, [optax_contestant("sgd", optax.sgd, (0.1, 0.2))], seeds=2, out=directory)
    return directory


@pytest.fixture
def kept(three_runs, tmp_path):
    """A directory with three runs, a copy for each test."""
    shutil.copytree(three_runs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_that_failed_is_repeated(tiny, kept):
    file = kept / "records.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[-1] |= {"status": "failed", "reason": "out of memory"}
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = run(tiny, [optax_contestant("sgd", optax.sgd, (0.1, 0.2))], seeds=2, out=kept)
    assert {record["status"] for record in runs} == {"finished"}


def test_runs_that_are_there_are_not_repeated(tiny, kept):
    before = (kept / "records.jsonl").read_text()
    run(tiny, [optax_contestant("sgd", optax.sgd, (0.1, 0.2))], seeds=2, out=kept)
    assert (kept / "records.jsonl").read_text() == before
    run(tiny, [optax_contestant("sgd", optax.sgd, (0.1, 0.2))], seeds=3, out=kept)
    after = (kept / "records.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 4
    with pytest.raises(
        RecordsError, match=r"runs of digits with --work 1, not 0.5; take another --out"
    ):
        run(tiny, [optax_contestant("sgd", optax.sgd, (0.1, 0.2))], out=kept, work=0.5)


def test_a_run_that_failed_is_made_again(kept):
    """It may have failed for want of memory, say; one that diverged would diverge again."""
    records = Records(kept)
    record = records.runs[0]
    for status, is_found in (("finished", True), ("diverged", True), ("failed", False)):
        records.add({**record, "status": status})
        assert (records.find(record) is not None) is is_found
    records.close()


@pytest.mark.parametrize("left", [1, 5, 9, 40, -1])
def test_a_line_that_was_cut_short_is_removed_and_its_run_repeated(tiny, kept, left):
    lines = (kept / "records.jsonl").read_text().splitlines()
    (kept / "records.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:left])
    assert len(read(kept)) == 2
    records = Records(kept)
    assert records.cut_short
    records.close()
    runs = run(tiny, [optax_contestant("sgd", optax.sgd, (0.1, 0.2))], seeds=2, out=kept)
    assert len(runs) == 3
    after = (kept / "records.jsonl").read_text().splitlines()
    assert after[:2] == lines[:2]
    assert [json.loads(line)["seed"] for line in after] == [0, 0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loss,accuracy\n0.1,0.9\n", "line 1 is no record of gnlin compare: it is not JSON"),
        ('{"loss": 3}\n', "line 1 is no record of gnlin compare. Take another --out"),
        ("a note", "line 1 is no record of gnlin compare"),
        (
            f'{{"schema": {SCHEMA + 1}}}\n',
            f"line 1 has schema {SCHEMA + 1}, and this version of gnlin reads {SCHEMA}",
        ),
        (
            f'{{"schema": {SCHEMA}, "task": "digits"}}\n',
            "line 1 lacks command, compile_seconds, contestant, cost_per_step, curve",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, content, message):
    (tmp_path / "records.jsonl").write_text(content)
    for reader in (read, Records):
        with pytest.raises(RecordsError, match=message):
            reader(tmp_path)
    assert (tmp_path / "records.jsonl").read_text() == content


def test_a_directory_that_cannot_be_used_is_named(tmp_path, kept):
    (tmp_path / "file").touch()
    with pytest.raises(
        RecordsError, match=r"cannot write to .*file/results: .*; take another --out"
    ):
        Records(tmp_path / "file" / "results")
    with pytest.raises(RecordsError, match=r"no records\.jsonl in"):
        read(tmp_path / "nothing")
    records = Records(kept)
    with pytest.raises(RecordsError, match="is in use by another comparison"):
        Records(kept)
    records.close()


class Full:
    """A file on a disk with room for 40 bytes."""

    def __init__(self, file):
        self.file, self.room = file, 40

    def write(self, content):
        if not self.room:
            raise OSError(28, "No space left on device")
        self.room = 0
        return self.file.write(content[:40])

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()


def test_a_full_disk_is_named_and_what_was_written_stays(kept, monkeypatch):
    records = Records(kept)
    monkeypatch.setattr(records, "_file", Full(records._file))
    with pytest.raises(
        RecordsError, match="No space left on device; make room and run the same command"
    ):
        records.add({**records.runs[0], "seed": 7})
    records.close()
    assert not (kept / "records.jsonl").read_text().endswith("\n")
    assert len(read(kept)) == 3
    again = Records(kept)
    assert again.cut_short
    again.close()
    assert (kept / "records.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("curve", [{}, {"step": [], "loss": []}, {"step": [0], "loss": [0.5, 0.4]}])
def test_a_record_without_a_whole_curve_is_named(kept, curve):
    path = kept / "records.jsonl"
    first, *others = path.read_text().splitlines()
    record = json.loads(first)
    whole = (
        {name: values[:1] for name, values in record["curve"].items()}
        if len(curve.get("loss", [])) > 1
        else {}
    )
    path.write_text("\n".join([json.dumps({**record, "curve": {**whole, **curve}}), *others, ""]))
    result = CliRunner().invoke(cli.app, ["report", str(kept)])
    assert result.exit_code == 2
    assert re.search(
        r"line 1 lacks .*\. Delete the line: its run will be done again", result.output
    )


# Executors.


def test_any_executor_gives_the_same_runs(tiny):
    words = ["sgd", "adam:learning_rate=0.004"]
    alone = run(tiny, words, seeds=2)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        shared = run(tiny, words, seeds=2, executor=executor)

    def outcome(runs):
        return {
            (run["label"], run["seed"], *run["setting"].values()): run["curve"]["loss"]
            for run in runs
        }

    assert outcome(shared).keys() == outcome(alone).keys()
    for key, losses in outcome(alone).items():
        # XLA divides a product among threads that are free, and a sum in another order is rounded
        # otherwise.
        np.testing.assert_allclose(outcome(shared)[key], losses, rtol=1e-3)
    assert len(alone) == (5 + 1) + 2


def test_jobs_of_one_study_share_a_program_after_they_have_travelled(tiny):
    import cloudpickle

    own = optax_contestant("own", optax.sgd, (0.01, 0.04))
    first, second = (Study(tiny, entries_of([own]), 1, Records(), 20.0) for _ in range(2))
    jobs = [job for study in (first, second) for job in next(study._plan(study.entries[0]))]
    keys = [_key(job, job.task) for job in cloudpickle.loads(cloudpickle.dumps(jobs))]
    assert keys[0] == keys[1]
    assert keys[1] != keys[2]


def test_a_dask_cluster_makes_the_runs(tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        runs = run(
            "diabetes", ["adam"], seeds=2, work=0.002, executor=client.get_executor(pure=False)
        )
    assert [record["status"] for record in runs] == ["finished"] * 6


def test_workers_that_die_end_the_study_and_not_the_records(tiny, tmp_path):
    class Killed(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function, *arguments):
            if self._work_queue.qsize() or self._threads:
                raise concurrent.futures.BrokenExecutor("killed")
            return super().submit(function, *arguments)

    class Broken(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function, *arguments):
            def die():
                raise concurrent.futures.BrokenExecutor("killed")

            return super().submit(die)

    for executor in (Killed(1), Broken(1)):
        with pytest.raises(
            RecordsError, match=r"a worker process died.*run the same command again"
        ):
            run(tiny, ["adam"], seeds=1, out=tmp_path, executor=executor)
    assert read(tmp_path) == []


class AtOnce(concurrent.futures.Executor):
    """Makes a run when it is handed over, and dies at one of them."""

    def __init__(self, dies_at):
        self.futures, self.dies_at = [], dies_at

    def submit(self, function, job):
        future = concurrent.futures.Future()
        self.futures.append(future)
        if len(self.futures) == self.dies_at:
            future.set_exception(concurrent.futures.BrokenExecutor("killed"))
        elif len(self.futures) > 5:
            raise concurrent.futures.BrokenExecutor("killed")
        elif len(self.futures) != 4:  # that one never ends
            future.set_result(function(job))
        return future


@pytest.mark.parametrize("dies_at", [1, 2, 5, 6])
def test_what_finished_beside_a_worker_that_died_is_kept(tiny, tmp_path, dies_at):
    executor = AtOnce(dies_at)
    with pytest.raises(RecordsError, match="a worker process died"):
        run(tiny, ["sgd", "adam"], seeds=1, out=tmp_path, executor=executor)
    assert len(read(tmp_path)) == len({1, 2, 3, 5} - {dies_at})
    assert executor.futures[
        3
    ].cancelled()  # what has not begun does not go on behind the caller's back


def test_a_study_tells_of_each_run_once_and_of_as_many_as_it_makes(tiny):
    def explode(rate):
        raise RuntimeError("no")

    words = [
        optax_contestant("bad", explode, (1.0, 2.0)),
        "il:period=4,learning_rate=0.01",
        "sgd",
        "kfac:batch=7000",
    ]
    told = []
    study = Study(tiny, entries_of(words), 3, Records(), 20.0)
    before = study.total
    for _ in study.carry_out(
        lambda job, done: told.append((job.entry.label, job.number, job.seed, done))
    ):
        pass
    ends = [event for event in told if event[-1] == 1.0]
    assert len(ends) == len(set(ends)) == len(study.records.runs) == study.total == before - 2
    assert all(0 <= event[-1] <= 1 for event in told)


def test_what_does_not_travel_is_a_reason(tiny):
    class Dying(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function, *arguments):
            return super().submit(lambda: os.strerror("no number"))

    study = Study(tiny, entries_of(["adam:learning_rate=0.1"]), 1, Records(), 20.0)
    ((_, (record,)),) = study.carry_out(executor=Dying(1))
    assert record["status"] == "failed"
    assert record["reason"].startswith("TypeError: ")


def test_a_job_travels(tiny):
    import cloudpickle

    study = Study(digits(), entries_of(["il:period=never"]), 1, Records(), 20.0, by_name=True)
    (job, *_) = next(study._plan(study.entries[0]))
    assert job.task == "digits"
    record = make(cloudpickle.loads(cloudpickle.dumps(dataclasses.replace(job, work=4.0))))
    assert record["status"] == "finished", record["reason"]


def test_a_job_travels_with_a_compiled_start(tiny):
    """JAX 0.12 has no shapes of a compiled function that came through pickle."""
    import cloudpickle

    task = dataclasses.replace(tiny, init=jax.jit(tiny.init))
    study = Study(task, entries_of(["adam:learning_rate=0.1"]), 1, Records(), 20.0)
    (job, *_) = next(study._plan(study.entries[0]))
    record = make(cloudpickle.loads(cloudpickle.dumps(dataclasses.replace(job, work=4.0))))
    assert record["status"] == "finished", record["reason"]


# From Python.


def test_what_python_hands_over_is_checked(tiny):
    with pytest.raises(ValueError, match=r"`contestants` must be a sequence; write \['adam'\]"):
        run(tiny, "adam")
    with pytest.raises(
        ValueError, match=r"holds GradientTransformation.*takes part as optax_contestant\(name,"
    ):
        run(tiny, [optax.adam(0.01)])


def test_results_of_another_task_of_the_same_name_are_refused(tiny, tmp_path):
    own = dataclasses.replace(tiny, name="own")
    words = {"contestants": ["adam:learning_rate=0.01"], "seeds": 1, "work": 0.1, "out": tmp_path}
    run(own, **words)
    run(own, **words)
    halved = jax.tree.map(lambda leaf: leaf / 2 if leaf.ndim == 2 else leaf, own.train)
    for other in (
        dataclasses.replace(own, train=halved),
        dataclasses.replace(own, batch_size=8),
        dataclasses.replace(own, target=0.1),
    ):
        with pytest.raises(
            RecordsError,
            match=r"has runs of another task 'own'.*take another name, or another --out",
        ):
            run(other, **words)
    assert len(read(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"`sweep` wants a sequence .* write {'damping': \[5\]}"):
        run(tiny, ["gn"], sweep={"damping": 5})
    with pytest.raises(
        ValueError, match="`batch_size` must be 1 to 40, or None for all data; got 41"
    ):
        dataclasses.replace(tiny, batch_size=41)
    with pytest.raises(ValueError, match="the contestant 'none' has no value in its grid"):
        run(tiny, [optax_contestant("none", optax.sgd, ())])


def test_a_task_and_an_optimiser_from_outside():
    objective = gnlin.Objective(
        lambda params, batch: batch["x"] @ params["w"],
        lambda outputs, batch: 0.5 * jnp.mean((outputs - batch["y"]) ** 2),
    )
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    data = {"x": x, "y": x @ np.array([1.0, -2.0, 0.5], np.float32)}
    task = gnlin.compare.Task(
        name="line",
        objective=objective,
        init=lambda key: {"w": jax.random.normal(key, (3,))},
        train=data,
        held_out=data,
        quality=gnlin.compare.Quality("mean square", objective, 1e-6, higher_is_better=False),
        batch_size=16,
        work=300.0,
        target=1e-3,
    )
    lion = optax_contestant(
        "lion", lambda rate: optax.lion(rate, weight_decay=0.0), (0.001, 0.01, 0.1)
    )
    runs = run(task, [lion, "gn-cg:control=constant"], seeds=2)
    assert {record["label"] for record in runs} == {"lion", "gn-cg:control=constant"}
    assert min(record["curve"]["quality"][-1] for record in runs) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "digts"}, "`task` must be one of digits"),
        ({"seeds": 0}, "must be positive"),
        ({"work": 0.0}, "must be positive"),
        ({"contestants": ["adm"]}, "did you mean 'adam'"),
    ],
)
def test_python_interface_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"task": "digits", **options})


# The command line.


@pytest.fixture
def command(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "digits", lambda: tiny)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        monkeypatch.setattr(sys, "argv", ["gnlin", *map(str, arguments)])
        return CliRunner().invoke(
            cli.app, [*map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"}
        )

    return invoke


def test_interrupted_study_keeps_its_runs_and_the_same_command_goes_on(
    command, tmp_path, monkeypatch
):
    calls = []
    original = Program.run

    def interrupted(self, number, seed, *rest):
        calls.append((self.entry.label, number, seed))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(self, number, seed, *rest)

    monkeypatch.setattr(Program, "run", interrupted)
    options = ("compare", "digits", "sgd", "adam", "--seeds", 2)
    result = command(*options)
    assert result.exit_code == 130, result.output
    assert "To go on: " in result.output
    assert "gnlin compare digits sgd adam --seeds 2" in result.output
    records = tmp_path / "gnlin-results" / "digits" / "records.jsonl"
    assert len(records.read_text().splitlines()) == 7
    result = command(*options)
    assert result.exit_code == 0, result.output
    assert len(calls) == 8 + 5
    assert calls[7] == calls[8]
    assert (records.parent / "report.html").exists()
    assert command("report", records.parent).exit_code == 0
    (records.parent / "task.json").unlink()
    result = command("report", records.parent)
    assert result.exit_code == 2
    assert (
        "says nothing of the task 'digits'; run `gnlin compare digits` into it again"
        in result.output.replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "digts"], "unknown task 'digts'; did you mean 'digits'?"),
        (["compare", "digits", "sdg"], "unknown contestant 'sdg'; did you mean 'sgd'?"),
        (["compare", "digits", "il:perod=3"], "did you mean 'period'?"),
        (
            ["compare", "digits", "--sweep", "period"],
            "--sweep period: write option=value,value,...",
        ),
        (["compare", "digits", "--sweep", "perod=3,4"], "has an option 'perod' to sweep"),
        (["compare", "digits", "--work", "0"], "--work must be positive"),
        (
            ["compare", "digits", "adam:learning_rate=-1"],
            "adam:learning_rate must be a number of at least 0; got '-1'",
        ),
        (["compare", "digits", "gn-cg:warm_start=5"], "gn-cg:warm_start=5: `warm_start` must"),
        (["report", "nowhere"], "no records.jsonl in nowhere"),
        (["compare", "digits", "--out", "/dev/null/x"], "cannot write to /dev/null/x"),
        (["compare", "mnist"], "mnist"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(command, arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", TASKS)
def test_a_description_is_a_whole_sentence(name):
    assert re.fullmatch(r"[A-Z].*\.", describe(name))


def test_lists_name_everything(command):
    shown = command("tasks").output
    assert all(name in shown for name in TASKS)
    shown = command("contestants").output
    assert all(name in shown for name in CONTESTANTS)
    assert "period=16" in shown
    for expected in ("--sweep", "--seeds", "--workers", "--out"):
        assert expected in command("compare", "--help").output


def test_processes_share_the_runs(tmp_path):
    words = ["diabetes", "adam:learning_rate=0.01", "sgd:learning_rate=0.01"]
    options = ["--seeds", "1", "--work", "0.002", "--workers", "2", "--out", str(tmp_path)]
    result = python(["-m", "gnlin"], "compare", *words, *options)
    assert result.returncode == 0, result.stderr
    assert (
        "run 2 of 2: " in result.stdout
    )  # a log tells of each run; the number is told once, in the label
    assert re.search(
        r"run \d of 2: adam:learning_rate=0.01, seed 0: finished, train loss \S+, \S+ s",
        result.stdout,
    )
    assert [record["status"] for record in read(tmp_path)] == ["finished"] * 2


def test_nothing_that_finished_is_lost_or_repeated_after_kill_9(tmp_path):
    arguments = [
        "compare",
        "diabetes",
        "sgd",
        "adam",
        "--seeds",
        "2",
        "--work",
        "0.01",
        "--out",
        str(tmp_path),
    ]
    path = tmp_path / "records.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "gnlin", *arguments], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first, before = path.read_text().split("\n", 1)
    path.write_text(before)  # without its first run, which another process is to repeat
    assert python(["-m", "gnlin"], *arguments).returncode == 0
    after = path.read_text()
    assert after.startswith(before[: before.rfind("\n") + 1])
    runs = [json.loads(line) for line in after.splitlines()]
    keys = [(record["label"], *record["setting"].values(), record["seed"]) for record in runs]
    assert len(set(keys)) == len(keys) == 12
    (again,) = (
        run
        for run in runs
        if all(run[key] == json.loads(first)[key] for key in ("label", "setting", "seed"))
    )
    assert again["curve"]["loss"] == json.loads(first)["curve"]["loss"]


def python(code_or_module, *arguments):
    return subprocess.run(
        [sys.executable, *code_or_module, *arguments], capture_output=True, text=True, check=False
    )


def test_missing_extra_is_named_in_one_line():
    code = "import sys; sys.modules['typer'] = None; from gnlin.__main__ import main; main()"
    result = python(["-c", code])
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == 'The command line needs typer, which is not installed: pip install "gnlin[compare]"'
    )


def test_core_import_leaves_the_command_line_alone():
    extra = ("typer", "rich", "matplotlib", "sklearn")
    code = f"import sys, gnlin; print([m for m in {extra} if m in sys.modules])"
    assert python(["-c", code]).stdout.strip() == "[]"


def test_a_method_is_what_an_optimiser_from_another_library_becomes(tiny):
    """Sign descent, with a state of its own and randomness from the key."""

    def build(task, options):
        def step(params, state, batch, key):
            grads = jax.grad(task.objective.value)(params, batch)
            noise = jax.random.uniform(key, ())
            rate = options["learning_rate"] * noise
            return jax.tree.map(lambda p, g: p - rate * jnp.sign(g), params, grads), state + 1

        return Method(init=lambda params, batch, key: jnp.zeros([], jnp.int32), step=step)

    contestant = Contestant("sign", "Sign descent.", build, grid=(0.01,))
    first, second = (run(tiny, [contestant], seeds=1)[0]["curve"]["loss"] for _ in range(2))
    assert first == second
    assert first[-1] < first[0]


# The rooms: their order, and the way of imports, are held by tests/test_package.py.

COMPARE = Path(gnlin.compare.__file__).parent


@pytest.mark.parametrize("room", ["", "tasks", "entrants", "runs", "report"])
def test_no_function_shares_its_name_with_a_module_of_its_room(room):
    inside = {module.name for module in pkgutil.iter_modules([str(COMPARE / room)])}
    assert inside
    for name in inside:
        module = importlib.import_module(".".join(filter(None, ("gnlin.compare", room, name))))
        functions = {
            own
            for own, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        }
        assert functions.isdisjoint(inside)


def test_loops_of_jax_are_opened_elsewhere():
    """By `gnlin.jaxprs`: the names that hold the programs of a loop."""
    for path in COMPARE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"cond_jaxpr|body_jaxpr|Literal\b", text), path

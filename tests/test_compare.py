import dataclasses
import io
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import gnlin
from gnlin.compare import cli, report
from gnlin.compare.contestants import CONTESTANTS, grid
from gnlin.compare.cost import StepCost, flops, gradient_flops, product_flops
from gnlin.compare.run import Program
from gnlin.compare.study import Records, Study
from gnlin.compare.summary import Spread, choose, reached, summarise
from gnlin.compare.tasks import TASKS, digits

BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


@pytest.fixture(autouse=True)
def _strict():
    """Optax's own optimisers are among the contestants, and they are written for the usual promotion of dtypes."""
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
        steps=20,
        full_batch_steps=20,
        target=0.5,
    )


def record(losses, *, contestant="sgd", setting=None, seed=0):
    steps = list(range(len(losses)))
    curve = {"step": steps, "cost": [2.0 * step for step in steps], "loss": losses, "accuracy": [0.9] * len(losses)}
    return {
        "task": "digits",
        "contestant": contestant,
        "setting": setting or {"lr": 0.1},
        "seed": seed,
        "steps": steps[-1],
        "diverged": not math.isfinite(losses[-1]),
        "seconds": 1.0,
        "compile_seconds": 2.0,
        "curve": curve,
    }


# Tasks.


def test_split_of_digits_is_the_one_defined(task):
    data = load_digits()
    pixels = data.data / 16
    order = np.random.default_rng(0).permutation(1797)
    expected = ((pixels - pixels.mean()) / pixels.std())[order]
    np.testing.assert_allclose(task.train["x"], expected[:1437], rtol=1e-6)
    np.testing.assert_allclose(task.held_out["x"], expected[1437:], rtol=1e-6)
    np.testing.assert_array_equal(jnp.concatenate([task.train["y"], task.held_out["y"]]), data.target[order])
    assert task.train["x"].shape == (1437, 64)
    assert task.held_out["x"].shape == (360, 64)
    assert task.train["x"].dtype == jnp.float32


def test_digits_network_is_the_one_defined(task):
    params = task.init(jax.random.key(1))
    keys = jax.random.split(jax.random.key(1), 3)
    for layer, key, shape in zip(params, keys, [(64, 128), (128, 64), (64, 10)], strict=True):
        np.testing.assert_allclose(layer["w"], jax.random.normal(key, shape) / np.sqrt(shape[0]), rtol=1e-6)
        np.testing.assert_array_equal(layer["b"], np.zeros(shape[1]))


def test_batches_are_a_permutation_each_epoch(task):
    batches = task.batches(seed=3, steps=30)
    assert batches.shape == (30, 128)
    assert len(np.unique(batches[:11])) == 11 * 128
    assert not np.array_equal(batches[:11], batches[11:22])
    np.testing.assert_array_equal(batches[:5], task.batches(seed=3, steps=5))
    assert not np.array_equal(batches, task.batches(seed=4, steps=30))


# Cost.


def test_an_adam_step_costs_one_gradient_and_a_linearised_one_five_thirds(task):
    unit = gradient_flops(task)
    adam = Program(task, BY_NAME["adam"], unit).cost
    # Adam's own arithmetic is 15 operations for each parameter against 6 × 128 for the gradient.
    assert adam.step == pytest.approx(1.0, abs=0.025)
    assert adam.product == 0.0
    linearised = Program(task, BY_NAME["linearise-16"], unit).cost
    # The first layer passes no gradient on to the data, which saves a little of the linearised step as of the gradient.
    assert linearised.step == pytest.approx(5 / 3, rel=0.04)
    full = Program(task, BY_NAME["sgd-full"], unit).cost
    assert full.step == pytest.approx(1437 / 128, rel=0.01)


def test_a_gauss_newton_step_costs_what_an_unrolled_one_does(task):
    """The loop of conjugate gradients written out, so that XLA counts every turn."""
    unit, iterations = gradient_flops(task), 4

    def step(params, batch):
        _, grads = task.objective.value_and_grad(params, batch)
        product = gnlin.ggn_vector_product(task.objective, params, batch)
        x = jax.tree.map(jnp.zeros_like, params)
        residual = direction = grads
        for _ in range(iterations):
            image = jax.tree.map(lambda g, d: g + 0.1 * d, product(direction), direction)
            rr = optax.tree.vdot(residual, residual)
            length = rr / optax.tree.vdot(direction, image)
            x = jax.tree.map(lambda a, d, length=length: a + length * d, x, direction)
            residual = jax.tree.map(lambda r, i, length=length: r - length * i, residual, image)
            ratio = optax.tree.vdot(residual, residual) / rr
            direction = jax.tree.map(lambda r, d, ratio=ratio: r + ratio * d, residual, direction)
        return jax.tree.map(jnp.subtract, params, x)

    batch = jax.tree.map(lambda leaf: leaf[:128], task.train)
    unrolled = flops(jax.jit(step).lower(task.init(jax.random.key(0)), batch).compile()) / unit
    cost = Program(task, BY_NAME["gauss-newton"], unit).cost
    assert cost.of(1, iterations) == pytest.approx(unrolled, rel=0.03)


def test_step_costs_add_up():
    cost = StepCost(step=2.0, product=1.5)
    assert cost.of(1, 1) == 2.0
    assert cost.of(3, 3 + 4) == 3 * 2.0 + 4 * 1.5


def test_a_product_costs_four_thirds_of_a_gradient_without_its_first_layer(task):
    # A gradient is 3 products per layer less the one for the data; a push-forward and a pull-back, 4 less one for each.
    widths = np.array([64 * 128, 128 * 64, 64 * 10])
    expected = (4 * widths.sum() - 2 * widths[0]) / (3 * widths.sum() - widths[0])
    assert product_flops(task, 128) / gradient_flops(task) == pytest.approx(expected, rel=0.03)


# Runs.


@pytest.mark.parametrize("name", BY_NAME)
def test_every_contestant_trains(tiny, name):
    contestant = dataclasses.replace(BY_NAME[name], budget=1.0)
    program = Program(tiny, contestant, 1e6)
    first = program.run(contestant.grid[1], seed=0)
    curve = first["curve"]
    assert curve["step"][0] == 0
    assert curve["step"][-1] == first["steps"] == 20
    assert curve["cost"][0] == 0
    assert all(np.diff(curve["cost"]) > 0)
    assert curve["loss"][-1] < curve["loss"][0]
    assert all(0 <= accuracy <= 1 for accuracy in curve["accuracy"])
    assert not first["diverged"]
    again = program.run(contestant.grid[1], seed=0)
    assert again["curve"] == curve
    assert program.run(contestant.grid[1], seed=1)["curve"]["loss"] != curve["loss"]


def test_the_model_being_trained_is_the_linearised_one(tiny):
    contestant = BY_NAME["linearise-never"]
    setting = contestant.grid[0]
    adam = optax.adam(setting["lr"])
    start = tiny.init(jax.random.key(0))

    @jax.jit
    def step(params, state, batch):
        _, grads = gnlin.linearised_value_and_grad(tiny.objective)(params, start, batch)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = start, adam.init(start)
    for indices in tiny.batches(0, 20):
        params, state = step(params, state, jax.tree.map(lambda leaf, indices=indices: leaf[indices], tiny.train))
    outputs = gnlin.linearise(tiny.objective, start, tiny.train).predict(params)
    final = Program(tiny, contestant, 1e6).run(setting, seed=0)["curve"]["loss"][-1]
    np.testing.assert_allclose(final, tiny.objective.loss_of(outputs, tiny.train), rtol=1e-3)


def test_a_diverged_run_is_reported_and_not_dropped(tiny, tmp_path):
    contestant = dataclasses.replace(BY_NAME["sgd"], grid=grid("lr", 1e38, 2e38, 3e38, 3.4e38))
    records = Records(tmp_path)
    for _ in Study(tiny, [contestant], 2, records).carry_out():
        pass
    assert len(records.finished) == 5
    assert all(run["diverged"] for run in records.finished)
    text = (tmp_path / "records.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]  # no NaN in JSON
    assert lines[0]["curve"]["loss"][-1] is None
    assert lines[0]["jax"] == jax.__version__
    assert math.isnan(Records(tmp_path).finished[0]["curve"]["loss"][-1])
    (row,) = summarise(records.finished, [contestant], tiny.target)
    assert row.loss.count == row.steps.count == 0
    report.picture([row], tiny, tmp_path / "curves.png")
    shown = as_text(report.table([row], tiny, seeds=2))
    assert "diverged" in shown
    assert "0 of 2" in shown


# Summary.


def test_target_counts_only_when_it_holds():
    assert reached(record([1.0, 0.1, 0.5, 0.1, 0.05]), 0.1) == 3
    assert reached(record([1.0, 0.1, 0.5]), 0.1) is None
    assert reached(record([1.0, 0.1, math.nan]), 0.1) is None
    assert reached(record([0.1, 0.1]), 0.1) == 0


def test_choice_prefers_work_to_target_then_final_loss():
    slow, fast = record([1.0, 1.0, 0.1, 0.01]), record([1.0, 0.1, 0.1, 0.1])
    assert choose([slow, fast], 0.1) is fast
    assert choose([slow, fast], 0.001) is slow
    assert choose([record([1.0, math.nan]), fast], 0.001) is fast


def test_spread_is_the_sample_deviation_of_those_that_have_a_value():
    spread = Spread.over([1.0, 2.0, None, 3.0])
    assert (spread.mean, spread.deviation, spread.count, spread.total) == (2.0, 1.0, 3, 4)
    assert math.isnan(Spread.over([1.0]).deviation)


def as_text(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_table_and_picture_from_records(task, tmp_path):
    contestants = [BY_NAME["sgd"], BY_NAME["linearise-256"]]
    records = []
    for contestant in contestants:
        for number, setting in enumerate(contestant.grid):
            losses = [1.0, 0.5, 0.01 / (1 + number)]
            records.append(record(losses, contestant=contestant.name, setting=dict(setting)))
        best = dict(contestant.grid[-1])
        records += [
            record([1.0, 0.4, 0.0002], contestant=contestant.name, setting=best, seed=1),
            record([1.0, 0.4, 0.3], contestant=contestant.name, setting=best, seed=2),
        ]
    rows = summarise(records, contestants, task.target)
    assert [row.contestant for row in rows] == contestants
    assert all(row.at_edge for row in rows)
    shown = as_text(report.table(rows, task, seeds=3))
    assert max(map(len, shown.splitlines())) <= 80
    for expected in ("linearise-256", "lr 0.008 *", "1 of 3", "90.0", "steps"):
        assert expected in shown
    report.picture(rows, task, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_incomplete_tuning_gives_no_row(task):
    assert summarise([record([1.0, 0.5])], [BY_NAME["sgd"]], task.target) == []


# The command line.


@pytest.fixture
def command(tiny, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", lambda: tiny)

    def run(*arguments):
        return CliRunner().invoke(cli.app, ["compare", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})

    return run


def test_interrupted_study_keeps_its_runs_and_resumes(command, tmp_path, monkeypatch):
    calls = []
    run = Program.run

    def interrupted(self, setting, seed, *rest):
        calls.append((self.contestant.name, setting["lr"], seed))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return run(self, setting, seed, *rest)

    monkeypatch.setattr(Program, "run", interrupted)
    where = tmp_path / "results"
    options = ("digits", "--only", "sgd", "--only", "adam", "--seeds", 2)
    result = command(*options, "--out", where)
    assert result.exit_code == 130, result.output
    assert "7 finished runs" in result.output
    assert f"--only sgd --only adam --resume {where}" in result.output
    assert "lr " in result.output  # the table of what is complete
    lines = (where / "records.jsonl").read_text().splitlines()
    assert len(lines) == 7

    # A line cut short, as by a crash, is that run's only loss.
    (where / "records.jsonl").write_text("\n".join(lines)[:-100])
    result = command(*options, "--resume", where)
    assert result.exit_code == 0, result.output
    assert calls[6:8] == calls[8:10]
    assert len(calls) == 8 + 4  # two trials of Adam that were missing, one that was cut, one seed
    assert len(Records(where).finished) == 2 * 5
    assert (where / "curves.png").exists()

    result = command(*options, "--resume", where)
    assert result.exit_code == 0, result.output
    assert len(calls) == 12


def test_unknown_names_are_errors_that_list_the_known(command, tmp_path):
    result = command("digts")
    assert result.exit_code == 2
    assert "unknown task 'digts'; known: digits" in result.output
    result = command("digits", "--only", "sdg")
    assert result.exit_code == 2
    assert "unknown contestant 'sdg'" in result.output
    assert "known: sgd, adam" in result.output
    assert command("digits", "--resume", tmp_path).exit_code == 2
    (tmp_path / "records.jsonl").touch()
    assert "--resume" in command("digits", "--out", tmp_path).output


def test_help_names_tasks_and_contestants(command):
    shown = command("--help").output
    for expected in ("digits", "linearise-256", "--resume", "--seeds"):
        assert expected in shown


def python(code_or_module, *arguments):
    return subprocess.run([sys.executable, *code_or_module, *arguments], capture_output=True, text=True, check=False)


def test_module_runs_as_a_command():
    result = python(["-m", "gnlin"], "--help")
    assert result.returncode == 0
    assert "compare" in result.stdout


def test_missing_extra_is_named_in_one_line():
    code = "import sys; sys.modules['typer'] = None; from gnlin.__main__ import main; main()"
    result = python(["-c", code])
    assert result.returncode == 1
    assert result.stderr.strip() == 'The command line needs typer, which is not installed: pip install "gnlin[compare]"'


def test_core_import_leaves_the_command_line_alone():
    code = "import sys, gnlin; print([m for m in ('typer', 'rich', 'matplotlib', 'sklearn') if m in sys.modules])"
    assert python(["-c", code]).stdout.strip() == "[]"

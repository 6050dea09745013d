"""From records to rows, figures, tables, files and the page; all records here are synthetic."""

import csv
import html.parser
import io
import json
import math
import re

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from gnlin.compare.report import drawing, figures, page, wording
from gnlin.compare.report.axes import _ticks
from gnlin.compare.report.bands import band
from gnlin.compare.report.lines import (
    Point,
    as_damping,
    damping_lines,
    moving_metrics,
    sweeps,
    swept,
    thinned,
)
from gnlin.compare.report.summary import Spread, incomplete, summarise
from gnlin.compare.report.terminal import ResultTable
from gnlin.compare.runs.records import SCHEMA, Records, TaskFacts, read
from gnlin.compare.runs.tuning import choose, reached

FACTS = TaskFacts("toy", "A toy.", 0.1, "accuracy, %", True, 97.0)
TASKS = {"toy": FACTS}
ENVIRONMENT = {"gnlin": "0.1.0", "jax": "0.12.0", "device": "cpu", "cpus": 4}


def record(losses, *, quality=None, options=None, setting=None, grid=None, cost=1.0, **changes):
    """One run with an evaluation at each step."""
    steps = range(len(losses))
    setting = setting or {"learning_rate": 0.1}
    qualities = (
        [90.0 + step for step in steps]
        if quality is None
        else [10.0] * (len(losses) - 1) + [quality]
    )
    known = {
        "task": "toy",
        "contestant": "sgd",
        "label": "sgd",
        "options": options or {},
        "setting": setting,
    }
    known |= {
        "grid": grid or list(setting.values()),
        "seed": 0,
        "status": "finished",
        "reason": "",
        "work": 10.0,
    }
    known |= {
        "steps": len(losses) - 1,
        "seconds": 0.5,
        "compile_seconds": 1.0,
        "cost_per_step": cost,
    }
    curve = {
        "step": list(steps),
        "cost": [cost * step for step in steps],
        "seconds": [0.1 * step for step in steps],
    }
    curve |= {"loss": list(losses), "network_loss": list(losses)}
    curve |= {"quality": qualities, "network_quality": [value - 1.0 for value in qualities]}
    known |= {
        "curve": curve,
        "environment": ENVIRONMENT,
        "command": "gnlin compare toy",
        "time": "2026-11-21T08:00:00+00:00",
    }
    return {**known, **changes}


def failed(reason="no such module", **changes):
    return record([], status="failed", reason=reason, **changes)


def entry(
    contestant,
    options,
    final=0.05,
    *,
    quality=98.0,
    seeds=3,
    best=0.1,
    grid=(0.01, 0.1, 1.0),
    label=None,
    tuned="learning_rate",
):
    """All runs of one row: trials of which `best` is the best, and its other seeds."""
    known = {
        "contestant": contestant,
        "label": label or contestant,
        "options": options,
        "grid": list(grid),
    }
    runs = []
    for value in grid:
        loss = final * (1 if value == best else 3)
        runs.append(record([1.0, 0.5, loss], quality=quality, setting={tuned: value}, **known))
    for seed in range(1, seeds):
        loss, its = final * (1 + 0.1 * seed), quality - 0.1 * seed
        runs.append(
            record([1.0, 0.5, loss], quality=its, setting={tuned: best}, seed=seed, **known)
        )
    return runs


def sweep_of_periods(
    inner="sgd", momentum=0.9, periods=(1, 4, 16, None), rates=(0.4, 0.4, 0.1, 0.1)
):
    runs = []
    for period, rate in zip(periods, rates, strict=True):
        options = {"inner": inner, "momentum": momentum, "period": period}
        label = f"il:inner={inner},period={period or 'never'}"
        runs += entry(
            "il",
            options,
            best=rate,
            grid=(0.1, 0.4),
            label=label,
            quality=98.0 - (period or 64) / 64,
        )
    return runs


def as_text(renderable, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The rules.


def test_target_counts_only_when_it_holds():
    assert reached(record([1.0, 0.1, 0.5, 0.1, 0.05]), 0.1) == 3
    assert reached(record([1.0, 0.1, 0.5]), 0.1) is None
    assert reached(record([1.0, 0.1, math.nan]), 0.1) is None
    assert reached(record([0.1, 0.1]), 0.1) == 0
    assert reached(failed(), 0.1) is None
    assert reached(record([1.0, 0.1], status="diverged"), 0.1) is None


def test_choice_prefers_work_to_target_then_final_loss():
    slow, fast = record([1.0, 1.0, 0.1, 0.01]), record([1.0, 0.1, 0.1, 0.1])
    assert choose([slow, fast], 0.1) is fast
    assert choose([slow, fast], 0.001) is slow
    dear = record([1.0, 0.1, 0.1, 0.1], cost=5.0)
    assert choose([dear, slow], 0.1) is slow


def test_runs_that_do_not_finish_lose():
    poor = record([1.0, 0.9])
    for lost in (
        record([1.0, math.nan], status="diverged"),
        record([1.0, 0.01], status="diverged"),
        failed(),
    ):
        assert choose([lost, poor], 0.001) is poor
        assert choose([lost], 0.001) is lost


def test_spread_is_the_sample_deviation_of_those_that_have_a_value():
    spread = Spread.over([1.0, 2.0, None, 3.0, math.nan])
    assert (spread.mean, spread.deviation, spread.count, spread.total) == (2.0, 1.0, 3, 5)
    assert math.isnan(Spread.over([1.0]).deviation)
    assert math.isnan(Spread.over([]).mean)


# Rows.


def test_a_row_holds_the_chosen_setting_and_its_seeds():
    (row,) = summarise(entry("sgd", {"momentum": 0.9}, best=0.1), TASKS)
    assert row.setting == {"learning_rate": 0.1}
    assert not row.at_edge
    assert [run["seed"] for run in row.records] == [0, 1, 2]
    assert [run["setting"]["learning_rate"] for run in row.trials] == [0.01, 0.1, 1.0]
    assert row.loss.mean == pytest.approx(0.05 * 1.1)
    assert row.loss.deviation == pytest.approx(0.005)
    assert row.quality.mean == pytest.approx(97.9)
    assert row.network_quality.mean == pytest.approx(96.9)
    assert (row.steps.mean, row.cost.mean, row.seconds.mean) == (2.0, 2.0, pytest.approx(0.2))
    assert row.solved == 3


@pytest.mark.parametrize(
    ("low", "high"), [(98.6, 98.9), (93.0, 94.9), (99.55, 99.75), (0.0, 100.0), (96.0, 100.0)]
)
def test_every_percentage_axis_has_numbers(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)


def test_a_row_names_what_was_tuned_and_nothing_else():
    assert summarise(entry("sgd", {}), TASKS)[0].chosen == {"learning_rate": 0.1}
    said = [record([1.0], options={"learning_rate": 0.1}), failed()]
    for run in said:
        assert summarise([run], TASKS)[0].chosen == {}


def test_a_tie_is_not_at_the_edge():
    runs = [
        record([1.0, 0.5], setting={"learning_rate": rate}, grid=[0.01, 0.1])
        for rate in (0.01, 0.1)
    ]
    assert not summarise(runs, TASKS)[0].at_edge


def test_best_setting_at_the_edge_is_marked():
    assert [row.at_edge for row in summarise(entry("sgd", {}, best=1.0), TASKS)] == [True]
    assert [row.at_edge for row in summarise(entry("sgd", {}, best=0.1, grid=(0.1,)), TASKS)] == [
        False
    ]


def test_groups_are_task_contestant_and_options_in_order_of_appearance():
    runs = entry("b", {"x": 1, "y": 2}) + entry("a", {}) + entry("b", {"x": 2, "y": 2})
    assert [(row.contestant, row.options) for row in summarise(runs, TASKS)] == [
        ("b", {"x": 1, "y": 2}),
        ("a", {}),
        ("b", {"x": 2, "y": 2}),
    ]
    turned = [{**run, "options": {"y": 2, "x": 1.0}} for run in runs[:1]]
    assert len(summarise(runs + turned, TASKS)) == 3
    other = TaskFacts("other", "", 0.1, "error", False, 1.0)
    both = summarise(
        [*runs, *({**run, "task": "other"} for run in entry("a", {}))], {**TASKS, "other": other}
    )
    assert [row.task for row in both] == ["toy", "toy", "toy", "other"]
    assert both[-1].solved == 0  # an error of 98


def test_incomplete_tuning_gives_no_row_and_is_listed():
    runs = [run for run in entry("sgd", {}) if run["setting"] != {"learning_rate": 1.0}]
    assert summarise(runs, TASKS) == []
    (group,) = incomplete(runs)
    assert (group.label, group.missing) == ("sgd", (1.0,))
    assert incomplete(entry("sgd", {})) == []
    (later,) = incomplete([record([1.0, 0.5], seed=1)])
    assert later.missing == (0.1,)


def test_a_run_that_was_done_again_replaces_the_first():
    (row,) = summarise([failed(), record([1.0, 0.05])], TASKS)
    assert row.failed == 0
    assert row.loss.mean == 0.05


def test_failed_and_diverged_contestants_are_rows_with_their_reason():
    diverged = {
        "status": "diverged",
        "reason": "loss is NaN at step 1",
        "contestant": "b",
        "label": "b",
    }
    runs = [
        failed(),
        record([1.0, math.nan], quality=99.0, **diverged),
        record([1.0, 0.05], seed=1, contestant="b", label="b"),
    ]
    first, second = summarise(runs, TASKS)
    assert (first.failed, first.diverged, first.reason) == (1, 0, "no such module")
    assert (second.failed, second.diverged, second.reason) == (0, 1, "loss is NaN at step 1")
    assert (second.quality.count, second.quality.total, second.solved) == (1, 2, 0)
    assert wording.trouble(second) == "of 2 runs 1 diverged: loss is NaN at step 1"


# Curves and sweeps.


def test_bands_are_medians_and_ranges_at_common_places():
    runs = [record([8.0, 4.0, 2.0]), record([8.0, 2.0, 1.0]), record([8.0, 3.0, 6.0])]
    found = band(runs, "step", "loss", math.inf, 50)
    np.testing.assert_array_equal(found.across, [1, 2])
    np.testing.assert_array_equal([found.low, found.median, found.high], [[2, 1], [3, 2], [4, 6]])


def test_diverged_runs_count_as_the_worst_from_there_on():
    runs = [
        record([8.0, 4.0, 2.0]),
        record([8.0, 2.0, 1.0]),
        record([8.0, math.nan], status="diverged"),
    ]
    found = band(runs, "step", "loss", math.inf, 50)
    np.testing.assert_array_equal(found.high, [np.inf, np.inf])
    np.testing.assert_array_equal(found.median, [4, 2])
    assert band([failed()], "step", "loss", math.inf, 50) is None
    assert band([record([8.0])], "step", "loss", math.inf, 50) is None


def test_bands_have_no_more_places_than_asked_for():
    found = band([record(list(np.geomspace(1, 1e-3, 2000)))], "cost", "loss", math.inf, 100)
    assert 50 < len(found.across) <= 100
    assert (found.across[0], found.across[-1]) == (1, 1999)


def test_period_curve_has_a_line_for_each_choice_of_other_options():
    rows = summarise(
        sweep_of_periods() + sweep_of_periods("adam", None) + entry("sgd", {"momentum": 0.9}), TASKS
    )
    lines = sweeps(rows, "period")
    assert [line.label for line in lines] == ["il:inner=sgd", "il:inner=adam"]
    assert [point.value for point in lines[0].points] == [1, 4, 16, math.inf]
    expected = [[q, q - 0.1, q - 0.2] for q in (98 - 1 / 64, 98 - 4 / 64, 98 - 16 / 64, 97.0)]
    np.testing.assert_allclose([point.finals("quality") for point in lines[0].points], expected)
    np.testing.assert_allclose(
        [point.finals("network_quality") for point in lines[0].points], np.subtract(expected, 1)
    )
    np.testing.assert_allclose(lines[0].points[0].finals("loss"), [0.05, 0.055, 0.06])
    assert swept(rows) == ["period"]


def test_metrics_that_move_along_a_sweep_are_drawn(tmp_path):
    runs = sweep_of_periods() + sweep_of_periods("adam", None)
    for run in runs:  # those of the second sweep are from a version that kept none
        if run["options"]["inner"] == "sgd":
            alignment = 1.0 if run["options"]["period"] is None else 0.7 + 0.01 * run["seed"]
            run["metrics"] = {
                "kernel/alignment": alignment,
                "linearise/age": 5.0,
                "linearise/gap": math.nan,
            }
    rows = summarise(runs, TASKS)
    assert moving_metrics(sweeps(rows, "period")) == ["kernel/alignment"]
    line = next(line for line in sweeps(rows, "period") if line.options["inner"] == "sgd")
    assert [point.finals("kernel/alignment") for point in line.points] == [
        [0.7, 0.71, 0.72]
    ] * 3 + [[1.0] * 3]
    (drawn,) = (picture for picture in figures.pictures(rows, FACTS) if picture.kind == "state")
    (panel,) = drawn.figure.axes
    assert (drawn.name, panel.get_ylabel()) == ("period-state", "kernel/alignment")
    means = [
        each.get_ydata()
        for each in panel.lines
        if len(each.get_ydata()) == 3 and each.get_linestyle() != "None"
    ]
    assert any(np.allclose(mean, 0.71) for mean in means)
    text = page.write(tmp_path, runs, TASKS).read_text(encoding="utf-8")
    assert "State of the optimiser at the end" in text
    lines = read_csv(tmp_path / "runs.csv")
    assert [json.loads(line["metrics"]).get("kernel/alignment") for line in lines] == [
        run.get("metrics", {}).get("kernel/alignment") for run in runs
    ]


def test_metrics_that_are_not_finite_are_read_back_and_left_out(tmp_path):
    """A gap is infinite where a network overflows."""
    known = {"environment": ENVIRONMENT, "schema": SCHEMA}
    runs = sweep_of_periods()
    for run in runs:
        run |= known
        if run["options"]["period"] != 4:  # and there are records of older versions
            gap = math.inf if run["seed"] else 0.1 * (run["options"]["period"] or 64)
            run["metrics"] = {"linearise/gap": gap, "kernel/distance": math.nan}
    records = Records(tmp_path)
    for run in runs:
        records.add(run)
    records.close()
    found = read(tmp_path)
    assert [math.isnan(run["metrics"].get("linearise/gap", 0.0)) for run in found] == [
        run["seed"] > 0 and run["options"]["period"] != 4 for run in runs
    ]
    assert moving_metrics(sweeps(summarise(found, TASKS), "period")) == ["linearise/gap"]
    page.write(tmp_path, found, TASKS)


def test_a_sweep_needs_three_numbers():
    runs = [run for value in (1, 4) for run in entry("il", {"period": value})]
    assert sweeps(summarise(runs, TASKS), "period") == []
    named = [run for value in ("a", "b", "c", True, 2, 3) for run in entry("x", {"mode": value})]
    assert swept(summarise(named, TASKS)) == []
    widths = [run for value in (None, 8, 16, 32) for run in entry("x", {"width": value})]
    assert [p.value for p in sweeps(summarise(widths, TASKS), "width")[0].points] == [8, 16, 32]


def test_points_stand_at_one_over_learning_rate_and_period():
    (line,) = sweeps(summarise(sweep_of_periods(momentum=0.9), TASKS), "period")
    image = as_damping(line)
    # η/(1 − m) is 4, 4 and 1; never has no place.
    np.testing.assert_allclose([point.value for point in image.points], [1 / 4, 1 / 16, 1 / 16])
    assert [point.records[0]["options"]["period"] for point in image.points] == [1, 4, 16]
    (plain,) = sweeps(summarise(sweep_of_periods(momentum=None), TASKS), "period")
    np.testing.assert_allclose(
        [point.value for point in as_damping(plain).points], [2.5, 0.625, 0.625]
    )
    (adam,) = sweeps(summarise(sweep_of_periods("adam"), TASKS), "period")
    assert as_damping(adam) is None
    (stuck,) = sweeps(summarise(sweep_of_periods(momentum=1.0), TASKS), "period")
    assert as_damping(stuck) is None


def test_damping_is_swept_as_an_option_or_tuned():
    def swept(name, **options):
        values = (0.01, 0.1, 1.0)
        return [
            run
            for v in values
            for run in entry(name, {**options, "damping": v}, label=f"{name}:damping={v}")
        ]

    runs = swept("gn", control="constant") + entry(
        "sgn", {"control": "constant"}, tuned="damping", best=0.1
    )
    # A λ that changes during a run has no place beside one that does not, nor on the map from K.
    runs += swept("trust", control="gain-ratio") + entry("lm", {}, tuned="damping", best=0.1)
    by_option, by_trial = damping_lines(summarise(runs, TASKS))
    assert (by_option.label, by_trial.label) == ("gn", "sgn")
    assert [len(point.records) for point in by_option.points] == [3, 3, 3]
    assert [(point.value, len(point.records)) for point in by_trial.points] == [
        (0.01, 1),
        (0.1, 1),
        (1.0, 1),
    ]


def test_points_leave_out_runs_that_did_not_finish():
    point = Point(1.0, {}, (record([1.0, 0.5]), failed(), record([1.0, 0.1], status="diverged")))
    assert point.finals("loss") == [0.5]


def test_crowded_figures_keep_every_contestant():
    runs = [run for number in range(8) for run in entry(f"c{number}", {})]
    for period in range(1, 20):
        final = 0.05 if period == 7 else 0.06
        runs += entry(
            "il", {"period": period}, final, label="il" if period == 16 else f"il:period={period}"
        )
    rows = summarise(runs, TASKS)
    kept = [row.label for row in thinned(rows, FACTS.target, 16)]
    assert kept == [
        *(f"c{number}" for number in range(8)),
        "il:period=1",
        "il:period=7",
        "il",
        "il:period=19",
    ]
    assert thinned(rows, FACTS.target, 100) == rows
    assert len(thinned(rows, FACTS.target, 5)) == 5


def test_labels_do_not_overlap_and_stay_near():
    sizes = np.full(4, 0.1)
    np.testing.assert_allclose(
        drawing.spread_out(np.array([0.2, 0.5, 0.5, 0.9]), sizes), [0.2, 0.45, 0.55, 0.9]
    )
    for wanted in ([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.9, 1.0, 1.0]):
        places = drawing.spread_out(np.array(wanted), sizes)
        assert all(np.diff(places) >= 0.1 - 1e-12)
        assert places[0] >= 0.05 - 1e-12
        assert places[-1] <= 0.95 + 1e-12


def test_styles_differ_without_colour():
    looks = [
        (style["marker"], style["markerfacecolor"] == "white")
        for style in map(drawing.style, range(16))
    ]
    assert len(set(looks)) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"cost": [1e-6, 4.0, 8.0, 12.0]},  # a first state that costs a little
        {"cost": [2.5, 4.0, 8.0, 12.0]},  # and one that costs more
        {"cost": [1e-6, 1e-5, 8.0, 12.0]},  # a first step that costs next to nothing
        {"seconds": [1e-7, 0.2, 0.3, 0.4]},
        {"seconds": [0.0, 1e-9, 0.3, 0.4]},  # a clock that has hardly moved
        {"step": [0, 1, 20_000, 50_000]},
    ],
    ids=["start", "dear-start", "step", "seconds-start", "clock", "steps"],
)
def test_axes_begin_where_work_begins(changes):
    early = record([1.0, 0.5, 0.2, 0.05], contestant="b", label="b")
    early["curve"] |= changes
    runs = [record([1.0, 0.4, 0.3, 0.04]), early]
    drawn = figures.pictures(summarise(runs, TASKS), FACTS)
    curves = [picture for picture in drawn if picture.kind == "curve"]
    assert len(curves) == 5
    for picture in curves:
        (axes,) = picture.figure.axes
        firsts = []
        for run in runs:
            places = zip(run["curve"]["step"], run["curve"][picture.against], strict=True)
            end = run["curve"][picture.against][-1]
            firsts.append(min(x for step, x in places if step > 0 and x >= 1e-4 * end))
        left, right = axes.get_xlim()
        first, last = min(firsts), max(run["curve"][picture.against][-1] for run in runs)
        assert axes.get_xscale() == "log"
        assert first / 2 < left < first
        assert last < right < 2 * last
        picture.figure.draw_without_rendering()


def test_what_has_not_begun_is_not_drawn():
    """A run that has only its start has no place on an axis of work, nor has it a say in others."""
    start = record([1.0], status="diverged", contestant="b", label="b")
    start["curve"]["cost"] = [1e-6]
    runs = [record([1.0, 0.4, 0.3, 0.04]), start]
    for picture in figures.pictures(summarise(runs, TASKS), FACTS)[:5]:
        assert picture.left_out == ("b",)
        assert picture.figure.axes[0].get_xlim()[0] > 0.09
    others = [{**start, "seed": seed} for seed in (1, 2)]
    found = band([record([8.0, 4.0, 2.0]), *others], "cost", "loss", math.inf, 50)
    np.testing.assert_array_equal(found.across, [1, 2])


# The terminal.


def test_table_fits_into_80_columns_and_says_what_is_missing():
    runs = entry("sgd", {}) + entry(
        "levenberg-marquardt", {}, 0.5, quality=90.0, tuned="damping", best=1.0
    )
    runs += [{**run, "label": "il:inner=sgd,period=1024"} for run in entry("il", {}, seeds=2)]
    runs += [failed(contestant="kfac", label="kfac")]
    shown = as_text(ResultTable(summarise(runs, TASKS), FACTS))
    assert max(map(len, shown.splitlines())) <= 80
    for expected in (
        "levenberg-marquardt",
        "damping λ 1 *",
        "lr 0.1",
        "3/3",
        "0/3",
        "97.9",
        "96.9",
        "reached",
        "2 seeds so far",
    ):
        assert expected in shown
    assert "kfac: of 1 run 1 failed: no such module" in shown
    assert "stays at or below" in shown


@pytest.fixture
def table():
    """Labels and numbers as long as they usually are; not all runs reach the target."""
    runs = entry("sgd", {}, 5.5e-5) + entry("il", {}, label="il:inner=sgd,period=1024")
    runs += entry("gn", {}, label="gn-cg:control=constant,learning_rate=0.5", tuned="damping")
    runs += entry("lm", {}, 0.5, quality=90.0, tuned="damping", best=1.0)
    runs[-1]["curve"]["loss"][-1] = 0.05
    runs += entry("muon", {}, 0.3)
    return ResultTable(summarise(runs, TASKS), FACTS)


def between_rules(shown):
    """Lines of the table between its horizontal rules: the headings, then the rows."""
    parts = re.split(r"^ ─+ *$", shown, flags=re.MULTILINE)
    return [part.strip("\n").split("\n") for part in parts[1:-1]]


@pytest.mark.parametrize(("width", "headings"), [(80, 3), (120, 2), (160, 2), (240, 1)])
def test_table_uses_the_width_that_it_has(table, width, headings):
    shown = as_text(table, width)
    assert max(map(len, shown.splitlines())) <= width
    assert len(between_rules(shown)[0]) == headings
    for number in ("97.9", "96.9", "3/3", "0/3", "1 of 3"):
        assert number in shown
    in_one_line = width >= 120
    assert ("5.5e-2 ± 5.0e-3" in shown) == in_one_line
    assert ("97.9 ± 0.1" in shown) == in_one_line
    assert ("not reached" in shown) == in_one_line
    assert ("il:inner=sgd,period=1024" in shown) == in_one_line
    assert ("gn-cg:control=constant,learning_rate=0.5" in shown) == (width >= 160)


def test_long_numbers_have_one_line_in_120_columns():
    facts = TaskFacts("toy", "A toy.", 1e-9, "R²", True, 0.9)
    runs = entry("adam", {}, 4.7e-12, quality=-0.422, label="adam:learning_rate=0.004")
    for run in runs:
        run["curve"]["seconds"] = [second * (1 + run["seed"] / 7) for second in (0.0, 0.01, 0.03)]
    shown = as_text(ResultTable(summarise(runs, {"toy": facts}), facts), 120)
    assert max(map(len, shown.splitlines())) <= 120
    for number in ("5.2e-12 ± 4.7e-13", "-0.522 ± 0.100", "-1.522 ± 0.100", "0.034 ± 0.0043"):
        assert number in shown


def test_a_wide_table_has_one_line_for_a_row(table):
    for width, most in ((80, 5), (120, 3), (160, 2), (200, 1)):
        _, *rows = between_rules(as_text(table, width))
        rows = rows if len(rows) > 1 else [[line] for line in rows[0]]
        assert len(rows) == 5
        assert max(map(len, rows)) <= most


def test_terminal_shows_labels_as_they_are():
    (row,) = summarise([{**run, "label": "[bold]x"} for run in entry("sgd", {})], TASKS)
    assert "[bold]x" in as_text(ResultTable([row], FACTS))


@pytest.mark.parametrize(
    ("mean", "value", "shown"),
    [(99.2, 0.25, "0.2"), (0.0123, 0.001, "0.0010"), (1e-7, 2e-8, "2.0e-8"), (math.nan, 1.0, "1")],
)
def test_deviations_have_the_places_of_their_mean(mean, value, shown):
    assert wording.like(mean)(value) == shown


# The page and its files.


HOSTILE = '<b>bold</b> & "quoted" $x$ $'


@pytest.fixture(scope="module")
def everything():
    runs = sweep_of_periods() + sweep_of_periods("adam", None)
    for value in (0.01, 0.1, 1.0):
        runs += entry("gn", {"damping": value, "control": "constant"}, label=f"gn:damping={value}")
        runs += entry(
            "trust", {"damping": value, "control": "gain-ratio"}, label=f"trust:damping={value}"
        )
    runs += entry("lm", {}, tuned="damping") + entry("hostile", {}, label=HOSTILE)
    runs += [failed(reason="<script>alert(1)</script>", contestant="kfac", label="kfac")]
    runs += [record([1.0, math.nan], status="diverged", reason="NaN", contestant="d", label="d")]
    runs += entry("unfinished", {})[:1]
    runs[-1] = {**runs[-1], "environment": {**ENVIRONMENT, "jax": "0.10.2"}}
    return runs


@pytest.fixture(scope="module")
def written(everything, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    assert page.write(directory, everything, TASKS) == directory / "report.html"
    return directory


class Page(html.parser.HTMLParser):
    """Tags, attributes and text; whether all elements are closed in turn."""

    VOID = ("meta", "img", "br", "wbr", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_else(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    names = [tag for tag, _ in parsed.tags]
    assert "script" not in names
    assert "link" not in names
    assert not re.search(r"https?://|url\(|@import", text)
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == names.count("figcaption") == 10
    assert all(
        image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in images
    )
    assert all(attributes["href"].startswith("#") for tag, attributes in parsed.tags if tag == "a")
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in parsed.tags


def test_page_says_what_there_is_to_say(written):
    text = " ".join(Page((written / "report.html").read_text(encoding="utf-8")).text.split())
    for expected in (
        "gnlin compare toy",
        "Not all runs were made in the same environment: jax 0.12.0, 0.10.2",
        "Not tuned yet, and left out: unfinished (2 trials missing)",
        "kfac: of 1 run 1 failed: <script>alert(1)</script>",
        "d: of 1 run 1 diverged: NaN",
        "put at λ = 1/(ηK)",
        "so il:inner=adam is not drawn here",
        "λ is not constant in these runs",
        HOSTILE,
    ):
        assert expected in text


def test_hostile_labels_are_escaped(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert "<script" not in text


def test_figures_are_png_and_svg(written):
    stems = {path.stem for path in (written / "figures").iterdir()}
    curves = {
        "toy-loss-step",
        "toy-loss-cost",
        "toy-loss-seconds",
        "toy-quality-cost",
        "toy-quality-seconds",
    }
    sweeps = {"toy-period", "toy-damping", "toy-damping-first-or-last"}
    assert stems == curves | sweeps | {"toy-sensitivity-learning_rate", "toy-sensitivity-damping"}
    for stem in stems:
        assert (written / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (written / "figures" / f"{stem}.svg").read_text(encoding="utf-8")


def test_csv_files_hold_all_numbers(written, everything):
    rows, runs, curves = (read_csv(written / f"{name}.csv") for name in ("rows", "runs", "curves"))
    summary = summarise(everything, TASKS)
    assert [line["label"] for line in rows] == [row.label for row in summary]
    for line, row in zip(rows, summary, strict=True):
        assert json.loads(line["options"]) == row.options
        for name in ("loss", "quality", "network_quality"):
            spread = getattr(row, name)
            mean = float(line[f"{name}_mean"] or "nan")
            np.testing.assert_equal((mean, int(line[f"{name}_count"])), (spread.mean, spread.count))
    assert len(runs) == len(everything)
    assert sum(line["chosen"] == "True" for line in runs) == sum(
        len(row.records) for row in summary
    )
    assert {line["status"] for line in runs} == {"finished", "failed", "diverged"}
    for number, run in enumerate(everything):
        for name, values in run["curve"].items():
            found = [float(line[name] or "nan") for line in curves if int(line["run"]) == number]
            np.testing.assert_array_equal(found, values)


def test_the_same_records_give_the_same_files(tmp_path):
    (tmp_path / "figures").mkdir()
    rows = summarise([record([1.0, 0.5, 0.05])], TASKS)
    first, second = (
        page._embed(figures.pictures(rows, FACTS)[0], tmp_path, "toy")["source"] for _ in range(2)
    )
    assert first == second


def test_nothing_finished_and_nothing_at_all_are_pages_too(tmp_path):
    for runs in (
        [],
        [failed()],
        entry("sgd", {})[:1],
        [record([math.nan], status="diverged", reason="NaN")],
    ):
        Page(page.write(tmp_path, runs, TASKS).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "facts",
    [
        TaskFacts("toy", "", 1e-9, "rms error", False, 0.5),
        TaskFacts("toy", "", 0.1, "R²", True, 0.9),
    ],
)
def test_other_qualities_can_be_drawn(facts):
    runs = [
        run
        for period in (1, 4, None)
        for run in entry("il", {"period": period}, final=0.0, quality=0.7)
    ]
    rows = summarise(runs, {"toy": facts})
    drawn = figures.pictures(rows, facts)
    assert [picture.name for picture in drawn][5:] == ["period", "sensitivity-learning_rate"]
    for picture in drawn:
        picture.figure.draw_without_rendering()


def test_styles_are_not_left_behind():
    before = dict(matplotlib.rcParams)
    figures.pictures(summarise([record([1.0, 0.5])], TASKS), FACTS)
    assert dict(matplotlib.rcParams) == before

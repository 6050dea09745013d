"""What the README, the documentation and the examples show is run."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from problems import enable_x64

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
LANGUAGES = {"python", "text", "bash", "bibtex"}


def fences(page: Path) -> list[tuple[str, str, int]]:
    """``(language, text, line number)`` of the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(block[1], block[2], text.count("\n", 0, block.start()) + 1) for block in found]


def run(source: str, page: Path, names: dict) -> None:
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):  # as a reader of the page has them
        exec(compile(source, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs_and_prints_what_the_page_says(page, capsys):
    """The blocks of a page share their names; a ``text`` block after one is what it prints."""
    names: dict = {"__name__": "__main__"}
    blocks = fences(page)
    for (language, source, line), (following, expected, _) in zip(
        blocks, [*blocks, ("", "", 0)][1:], strict=True
    ):
        assert language in LANGUAGES, f"{page.name}:{line}: name the block's language"
        if language != "python":
            continue
        # As many empty lines as stand above the block, so that a traceback shows the line of the
        # page.
        run("\n" * line + source, page, names)
        printed = capsys.readouterr().out
        if following == "text":
            assert printed.split() == expected.split(), f"{page.name}:{line}"


def test_readme_example_trains(capsys):
    blocks = fences(README)
    assert {language for language, _, _ in blocks} <= LANGUAGES
    (source,) = (text for language, text, _ in blocks if language == "python")
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 25
    run(source, README, {})
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    said = re.search(
        r"three losses are ([\d.]+), ([\d.]+) and ([\d.]+)", README.read_text("utf-8")
    ).groups()
    assert losses == pytest.approx([float(loss) for loss in said], rel=0.3)


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """A function that runs an example in this process, and returns the printed text.

    A process of its own would import the same libraries again, which takes longer than most.
    """
    wide = jax.config.jax_enable_x64

    def call(name: str, *arguments: str) -> str:
        script = str(ROOT / "examples" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    yield call
    jax.config.update("jax_enable_x64", wide)  # an example may choose double precision


def run_command(name: str, cwd: Path, *arguments: str) -> str:
    """What an example prints as a program of its own, as a reader starts it."""
    # Here compilation is what takes long, and the threads of LAPACK would wait for those of other
    # tests.
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | quick
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_trains_every_optimiser(tmp_path):
    output = run_command("quickstart.py", tmp_path)
    rows = re.findall(r"^(.+?)\s{2,}([\d.]+)\s+([\d.]+)\s+([\d.]+)$", output, re.MULTILINE)
    assert len(rows) == 4
    for name, first, last, accuracy in rows:
        assert float(last) < float(first) / 4, name
        assert float(accuracy) > 0.9, name
    assert not list(tmp_path.iterdir())


def test_least_squares_reaches_the_certified_digits(run_example):
    output = run_example("least_squares.py")
    rows = re.findall(r"^b\d\s+(\S+)\s+(\S+)\s+([\d.]+)$", output, re.MULTILINE)
    assert len(rows) == 7
    for certified, fitted, digits in rows:
        assert abs(float(fitted) / float(certified) - 1) < 1e-8
        assert float(digits) > 8


def test_another_optimiser_takes_part(run_example, tmp_path):
    output = run_example("own_optimiser.py")
    rows = re.findall(r"^(\S+)\s+\S+\s+loss (\S+)  held out ([\d.]+) %$", output, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["adam"] * 5 + ["lion"] * 5
    assert max(float(accuracy) for name, _, accuracy in rows if name == "lion") > 90
    assert (tmp_path / "gnlin-results" / "own" / "records.jsonl").exists()


def test_submission_trains(run_example):
    output = run_example("algoperf_submission.py")
    assert float(re.search(r"accuracy after 200 steps: ([\d.]+)", output)[1]) > 0.95


def rows_of(table: str) -> list[list[str]]:
    """Cells of the body of a Markdown table."""
    lines = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    rules = [number for number, line in enumerate(lines) if set("".join(line)) <= set("-:")]
    return [
        [cell.strip() for cell in line]
        for number, line in enumerate(lines)
        if number not in rules and number + 1 not in rules
    ]


def test_reference_problems_favour_curvature(run_example):
    rows = rows_of(run_example("reference_problems.py", "gn", "sgd", "--quick"))
    assert [row[:2] for row in rows] == [
        ["diabetes-full", target] for target in ("0.1", "0.01", "0.001")
    ]
    gauss_newton, descent = rows[0][2:]
    assert float(gauss_newton) < 40
    assert descent == "–" or float(descent) > float(gauss_newton)


def test_steps_are_counted_against_the_batch(run_example, tmp_path):
    output = run_example("batch_sizes.py", "adam", "gn@3", "--quick")
    assert output.count("# digits-batch-") == 2 * 2 * 5  # trials
    rows = rows_of(output)
    assert [row[:2] for row in rows] == [
        [name, batch] for batch in ("32", "256") for name in ("adam", "gn")
    ]
    steps = {tuple(row[:2]): float(row[3]) for row in rows}
    assert steps["gn", "256"] < steps["gn", "32"]
    assert steps["gn", "256"] < steps["adam", "256"]
    folder = tmp_path / "gnlin-results" / "batch-sizes"
    assert (folder / "steps.svg").read_text("utf-8").startswith("<?xml")
    again = run_example("batch_sizes.py", "adam", "gn@3", "--quick")
    assert "# digits" not in again  # nothing is made twice
    assert rows_of(again) == rows == rows_of((folder / "steps.md").read_text("utf-8"))


def test_preconditioners_save_iterations(run_example):
    rows = rows_of(run_example("preconditioners.py", "--quick"))
    (loose, loose_nystrom), (strict, strict_nystrom) = (
        [int(cell.split()[0]) for cell in row[1:]] for row in rows
    )
    assert 0 < loose_nystrom < loose < strict
    assert strict_nystrom < strict / 2


def test_function_space_needs_less_work(run_example):
    (row,) = rows_of(run_example("function_space.py", "--quick"))
    dual, few, same = float(row[3]), float(row[6]), float(row[10])
    assert dual < min(few, same)
    assert float(row[5]) < 1e-4  # its residual


def test_kernels_are_faster_than_jacobians(run_example):
    *times, memory, _, _ = rows_of(run_example("kernels.py", "--quick"))
    assert [row[2] for row in times] == ["full", "diagonal", "trace"]
    assert all(float(row[6]) < 1e-5 for row in times)
    assert float(memory[4]) < float(memory[3])


def test_defaults_do_not_blow_up(run_example):
    rows = rows_of(run_example("stability.py", "--quick"))
    assert [row[1] for row in rows] == ["32", "full"]
    for _, _, _, start, largest, last, _ in rows:
        assert float(last) <= float(largest) < float(start)


def test_speed_is_measured(run_example):
    rows = rows_of(run_example("speed.py", "--quick"))
    assert [row[0] for row in rows] == ["gnlin, `CG`", "gnlin, defaults"]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)


def test_steps_are_timed_beside_those_of_adam(run_example):
    rows = rows_of(run_example("step_seconds.py", "--quick"))
    assert [row[0] for row in rows] == ["Adam", "`gauss_newton`", "with `rank=None`"]
    adam, *ours = ([float(cell) for cell in row[1:]] for row in rows)
    assert adam[2] == 1.0
    for mean, median, ratio, loss in ours:
        assert min(mean, median, ratio) > 0
        assert loss < adam[3] / 2


def test_spectral_norms_are_known(run_example):
    norms, *costs = rows_of(run_example("spectral_norms.py", "--quick"))
    assert float(norms[3]) < 2  # per cent
    assert [row[1] for row in costs] == ["128", "256"]
    assert float(costs[1][2].rstrip("%")) < 5


def test_features_are_mapped(run_example, tmp_path):
    rows = {
        row[0]: row for row in rows_of(run_example("feature_learning.py", "diabetes", "--quick"))
    }
    assert list(rows) == ["1", "4", "16", "never", "111", "000"]
    anchors = [int(rows[period][2]) for period in ("1", "4", "16", "never")]
    assert anchors[0] > anchors[1] > anchors[2] == anchors[3] == 1
    assert float(rows["1"][3]) < float(rows["4"][3]) < 1
    assert rows["never"][3:6] == ["1", "1", "0"]
    # Of the rates that were tried the table has the best one's losses, as the report does.
    for what, name, label in (
        ("drift", "4", "il-drift:period=4"),
        ("layers", "111", "il-layers:layers=111"),
    ):
        lines = (
            (tmp_path / "gnlin-results" / f"diabetes-quick-{what}" / "records.jsonl")
            .read_text("utf-8")
            .splitlines()
        )
        records = [json.loads(line) for line in lines]
        losses = [record["curve"]["loss"][-1] for record in records if record["label"] == label]
        assert len(losses) == 3
        assert float(rows[name][-2]) == pytest.approx(min(losses), rel=1e-3)


def test_width_transfer_finds_rates(run_example):
    rows = rows_of(run_example("width_transfer.py", "--quick"))
    assert [row[0] for row in rows] == ["Adam", "Adam, spectral *"]
    for row in rows:
        own, of_narrowest = map(float, row[-2:])
        assert own <= of_narrowest < 2.3  # what guessing loses


def test_filter_curves_hold_and_are_drawn(tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "docs" / "filter_curves.py"))
    with enable_x64(True):
        script["check"]()
        script["draw"](tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text("utf-8").startswith("<?xml")
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "mathematics.md").read_text("utf-8")
    assert printed.strip() in page
    assert (ROOT / "docs" / "filter_curves.svg").exists()

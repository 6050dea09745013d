"""Rows to a table on the terminal, to CSV files, and to one page with everything."""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gnlin.compare.report.figures import Picture, breakable, pictures, words
from gnlin.compare.report.summary import (
    Record,
    Row,
    Spread,
    TaskFacts,
    final,
    finished,
    incomplete,
    reached,
    summarise,
    tuned,
)
from gnlin.compare.runs.records import CURVES

PAGE = "report.html"
_LEGEND = (
    "To loss {target:g}: until the training loss stays at or below it; '2 of 3' runs where not all get there. "
    "Work: in units of one mini-batch gradient, by compiled FLOPs. Seconds: training steps alone, and compilation. "
    "Loss and held-out {quality} are those of the model being trained, and beside it of the network at the same "
    "parameters. Solved: runs that end {direction} {solved:g}. * best setting at the edge of its grid."
)
_ENDS = ("loss", "quality", "network_loss", "network_quality")
_RUN = ("task", "contestant", "label", "options", "tuned", "value", "seed")


# On the terminal.


def terminal(rows: Sequence[Row], task: TaskFacts, seeds: int | None = None) -> RenderableType:
    """The rows of one task as a table of mean ± standard deviation over seeds, and why runs failed.

    Args:
        rows: from `summary.summarise`.
        task: the task they are about.
        seeds: number of seeds asked for; `None` for as many as there are.

    Returns:
        What rich prints, in 80 columns where labels are not too long.
    """
    seeds = seeds or max((len(row.records) for row in rows), default=0)
    quality, _, unit = (part.strip() for part in task.quality_name.partition(","))
    view = Table(
        title=f"{task.name}: mean ± standard deviation over {_count(seeds, 'seed')}",
        caption=_LEGEND.format(
            target=task.target,
            quality=quality,
            direction="at or above" if task.higher_is_better else "at or below",
            solved=task.solved,
        ),
        caption_justify="left",
        title_justify="left",
        box=box.HORIZONTALS,
        padding=0,
    )
    view.add_column("contestant\nsetting", overflow="fold")
    for heading in (
        "final\ntrain\nloss",
        f"held-out\n{quality}\n{unit}".rstrip(),
        "of the\nnetwork",
        "solved",
        f"steps\nto loss\n{task.target:g}",
        f"work\nto loss\n{task.target:g}",
        "seconds\n+ to\ncompile",
    ):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        absent = "-" if row.failed == len(row.records) else "not\nreached"
        compiling = f"\n+ {row.compile_seconds:.1f}" if math.isfinite(row.compile_seconds) else ""
        begun = (
            f"\n{_count(len(row.records), 'seed')} so far"
            if len(row.records) < seeds and not row.failed
            else ""
        )
        view.add_row(
            Text(
                f"{breakable(row.label)}\n{describe(row.chosen)}{' *' if row.at_edge else ''}{begun}"
            ),
            _cell(row.loss, small, "failed" if row.failed else "diverged"),
            _cell(row.quality, like(row.quality.mean), "-"),
            _cell(row.network_quality, like(row.quality.mean), "-"),
            f"{row.solved}/{len(row.records)}",
            _cell(row.steps, "{:.0f}".format, absent),
            _cell(row.cost, "{:.0f}".format, absent),
            f"{_cell(row.seconds, brief, absent)}{compiling}",
            end_section=True,
        )
    reasons = [Text(f"{row.label}: {trouble(row)}") for row in rows if row.failed or row.diverged]
    return Group(view, *(Padding(reason, (0, 0, 0, 2)) for reason in reasons))


def describe(setting: Mapping[str, float]) -> str:
    """``lr 0.01``."""
    return ", ".join(
        f"{'lr' if name == 'learning_rate' else words(name)} {v:g}" for name, v in setting.items()
    )


def trouble(row: Row) -> str:
    """How many runs of a row diverged and failed, and why the first did."""
    parts = [
        f"{count} {verb}"
        for count, verb in ((row.diverged, "diverged"), (row.failed, "failed"))
        if count
    ]
    counts = f"of {_count(len(row.records), 'run')} {' and '.join(parts)}"
    return f"{counts}: {row.reason}" if row.reason else counts


def _cell(spread: Spread, show: Callable[[float], str], otherwise: str) -> str:
    if not spread.count:
        return otherwise
    deviation = "" if math.isnan(spread.deviation) else f"\n± {show(spread.deviation)}"
    missing = "" if spread.count == spread.total else f"\n{spread.count} of {spread.total}"
    return f"{show(spread.mean)}{deviation}{missing}"


def small(value: float) -> str:
    """``5.7e-5``."""
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", f"{value:.1e}").replace("e+", "e")


def brief(seconds: float) -> str:
    """``12.3``, ``0.031``."""
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


def like(mean: float) -> Callable[[float], str]:
    """Shows numbers with as many places as three digits of `mean` have."""
    if not math.isfinite(mean) or mean == 0:
        return "{:.3g}".format
    places = 2 - math.floor(math.log10(abs(mean)))
    return f"{{:.{min(max(places, 1), 4)}f}}".format if -2 < places < 5 else small


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


# Files.


def save_csv(
    directory: Path, records: Sequence[Record], tasks: Mapping[str, TaskFacts]
) -> list[Path]:
    """``rows.csv``, a line for each row of the tables; ``runs.csv``, for each run; ``curves.csv``,
    for each evaluation.

    ``run`` numbers the runs of the last two. What there is no number for is an empty field.
    """
    rows = summarise(records, tasks)
    chosen = {id(record) for row in rows for record in row.records}
    table = [_row_line(row) for row in rows]
    runs = [
        _run_line(number, r, tasks[r["task"]].target, id(r) in chosen)
        for number, r in enumerate(records)
    ]
    curves = (
        {"run": number, **_identity(record), **dict(zip(CURVES, values, strict=True))}
        for number, record in enumerate(records)
        for values in zip(*(record["curve"][name] for name in CURVES), strict=True)
    )
    files = {"rows.csv": table, "runs.csv": runs, "curves.csv": curves}
    return [_save(directory / name, lines) for name, lines in files.items()]


def _save(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, line in enumerate(lines):
            if number == 0:
                writer.writerow(line)
            writer.writerow(
                ["" if isinstance(v, float) and not math.isfinite(v) else v for v in line.values()]
            )
    return path


def _identity(record: Record) -> dict[str, Any]:
    name, value = tuned(record)
    values = [
        *(record[key] for key in _RUN[:3]),
        json.dumps(record["options"]),
        name,
        value,
        record["seed"],
    ]
    return dict(zip(_RUN, values, strict=True))


def _row_line(row: Row) -> dict[str, Any]:
    identity = _identity(row.records[0])
    del identity["seed"]
    spreads = {
        f"{name}_{part}": getattr(getattr(row, attribute), part)
        for name, attribute in (
            *((name, name) for name in ("loss", "quality", "network_quality")),
            *((f"{name}_to_target", name) for name in ("steps", "cost", "seconds")),
        )
        for part in ("mean", "deviation", "count")
    }
    counts = {
        "runs": len(row.records),
        "solved": row.solved,
        "diverged": row.diverged,
        "failed": row.failed,
    }
    rest = {"compile_seconds": row.compile_seconds, "reason": row.reason}
    return {**identity, "at_edge": row.at_edge, **counts, **spreads, **rest}


def _run_line(number: int, record: Record, target: float, chosen: bool) -> dict[str, Any]:
    index, curve = reached(record, target), record["curve"]
    return {
        "run": number,
        **_identity(record),
        "chosen": chosen,
        **{
            key: record[key]
            for key in ("status", "reason", "work", "steps", "seconds", "compile_seconds")
        },
        "cost_per_step": record["cost_per_step"],
        "spent": curve["cost"][-1] if curve["cost"] else math.nan,
        **{f"final_{name}": final(record, name) for name in _ENDS},
        **{
            f"{name}_to_target": math.nan if index is None else curve[name][index]
            for name in ("step", "cost", "seconds")
        },
        "metrics": json.dumps(record.get("metrics", {})),
        **{key: record.get(key, "") for key in ("command", "time")},
        "environment": json.dumps(record.get("environment", {})),
    }


def write(directory: Path, records: Sequence[Record], tasks: Mapping[str, TaskFacts]) -> Path:
    """DIR/report.html, one page that needs nothing else, and beside it DIR/figures and the CSV
    files.

    Args:
        directory: where they go; made if need be.
        records: runs of any number of tasks.
        tasks: what there is to know of these tasks, by name.

    Returns:
        The page.
    """
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    save_csv(directory, records, tasks)
    rows, undone = summarise(records, tasks), incomplete(records)
    environments = _distinct(record.get("environment", {}) for record in records)
    sections = [
        {
            "task": tasks[name],
            "rows": (own := [row for row in rows if row.task == name]),
            "pictures": [
                _embed(picture, directory, name) for picture in pictures(own, tasks[name])
            ],
            "incomplete": [group for group in undone if group.task == name],
            "trouble": _troubles([record for record in records if record["task"] == name]),
        }
        for name in dict.fromkeys(record["task"] for record in records)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"describe": describe, "with_breaks": _with_breaks}
    shows = {"small": small, "like": like, "whole": "{:.0f}".format, "brief": brief}
    page = directory / PAGE
    text = environment.get_template(f"{PAGE}.j2").render(
        sections=sections,
        commands=_distinct(record.get("command", "") for record in records),
        environments=environments,
        differing=_differing(environments),
        days=sorted({record["time"][:10] for record in records if record.get("time")}),
        parts=_parts,
        trouble=trouble,
        **shows,
    )
    page.write_text(text, encoding="utf-8")
    return page


def _embed(picture: Picture, directory: Path, task: str) -> dict[str, Any]:
    """Save a figure as PNG and SVG; the SVG as a data URI."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{task}-{picture.name}")
    drawn = io.BytesIO()
    # The same records give the same files: no date, and identifiers that depend on the contents
    # alone.
    with matplotlib.rc_context({"svg.hashsalt": stem, "svg.fonttype": "path"}):
        looks = {"bbox_inches": "tight", "pad_inches": 0.05}
        picture.figure.savefig(
            drawn, format="svg", metadata={"Date": None, "Creator": None}, **looks
        )
        picture.figure.savefig(
            directory / "figures" / f"{stem}.png", dpi=150, metadata={"Software": None}, **looks
        )
    (directory / "figures" / f"{stem}.svg").write_bytes(drawn.getvalue())
    source = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    return {"picture": picture, "source": source, "files": f"figures/{stem}"}


def _parts(spread: Spread, show: Callable[[float], str]) -> dict[str, str]:
    """Mean and deviation, and how many runs have a value where not all have one."""
    return {
        "mean": show(spread.mean) if spread.count else "",
        "deviation": "" if math.isnan(spread.deviation) else show(spread.deviation),
        "missing": f"{spread.count} of {spread.total}" if 0 < spread.count < spread.total else "",
    }


def _troubles(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Runs that did not finish, those of the same entry and reason together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        if not finished(record):
            key = (record["label"], record["status"], record["reason"])
            found.setdefault(key, []).append(
                f"{describe(record['setting'])}, seed {record['seed']}".lstrip(", ")
            )
    return [
        {"label": key[0], "status": key[1], "reason": key[2], "runs": runs}
        for key, runs in found.items()
    ]


def _with_breaks(label: str) -> Markup:
    """Escaped; lines may break after colons and commas."""
    return Markup(re.sub("[:,]", r"\g<0><wbr>", str(escape(label))))


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Those that are not empty, each once; they need not be hashable."""
    seen: list[Any] = []
    for value in values:
        if value and value not in seen:
            seen.append(value)
    return seen


def _differing(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """``jax 0.10.2, 0.12.0`` for what is not the same in all of them."""
    names = dict.fromkeys(name for environment in environments for name in environment)
    values = {
        name: _distinct(str(environment.get(name, "unknown")) for environment in environments)
        for name in names
    }
    return [f"{name} {', '.join(known)}" for name, known in values.items() if len(known) > 1]

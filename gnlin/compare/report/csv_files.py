"""Rows, runs and curves to CSV files."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gnlin.compare.report.summary import Row, summarise
from gnlin.compare.runs.records import CURVES, Record, TaskFacts
from gnlin.compare.runs.tuning import final, reached, tuned

# Column ↦ the spread of a row that it is about.
_SPREADS = {
    "loss": "loss",
    "quality": "quality",
    "network_quality": "network_quality",
    "steps_to_target": "steps",
    "cost_to_target": "cost",
    "seconds_to_target": "seconds",
}


def save_csv(
    directory: Path, records: Sequence[Record], tasks: Mapping[str, TaskFacts]
) -> list[Path]:
    """Write ``rows.csv``, ``runs.csv`` and ``curves.csv``.

    They have a line for each row of the tables, for each run, and for each evaluation. ``run``
    numbers the runs of the last two. A number that there is none of is an empty field.
    """
    rows = summarise(records, tasks)
    chosen = {id(record) for row in rows for record in row.records}
    runs = []
    for number, record in enumerate(records):
        target = tasks[record["task"]].target
        runs.append(_run_line(number, record, target, id(record) in chosen))
    files = {
        "rows.csv": [_row_line(row) for row in rows],
        "runs.csv": runs,
        "curves.csv": _curve_lines(records),
    }
    return [_save(directory / name, lines) for name, lines in files.items()]


def _save(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """The keys of the first line are the heading."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, line in enumerate(lines):
            if number == 0:
                writer.writerow(line)
            writer.writerow([_field(value) for value in line.values()])
    return path


def _field(value: Any) -> Any:
    return "" if isinstance(value, float) and not math.isfinite(value) else value


def _entry(record: Record) -> dict[str, Any]:
    """The columns that say which entry a run is of."""
    name, value = tuned(record)
    return {
        **{key: record[key] for key in ("task", "contestant", "label")},
        "options": json.dumps(record["options"]),
        "tuned": name,
        "value": value,
    }


def _row_line(row: Row) -> dict[str, Any]:
    line = {
        **_entry(row.records[0]),
        "at_edge": row.at_edge,
        "runs": len(row.records),
        "solved": row.solved,
        "diverged": row.diverged,
        "failed": row.failed,
    }
    for column, name in _SPREADS.items():
        spread = getattr(row, name)
        for part in ("mean", "deviation", "count"):
            line[f"{column}_{part}"] = getattr(spread, part)
    return {**line, "compile_seconds": row.compile_seconds, "reason": row.reason}


def _run_line(number: int, record: Record, target: float, chosen: bool) -> dict[str, Any]:
    curve, index = record["curve"], reached(record, target)
    line = {"run": number, **_entry(record), "seed": record["seed"], "chosen": chosen}
    for key in ("status", "reason", "work", "steps", "seconds", "compile_seconds", "cost_per_step"):
        line[key] = record[key]
    line["spent"] = curve["cost"][-1] if curve["cost"] else math.nan
    for name in ("loss", "quality", "network_loss", "network_quality"):
        line[f"final_{name}"] = final(record, name)
    for name in ("step", "cost", "seconds"):
        line[f"{name}_to_target"] = math.nan if index is None else curve[name][index]
    line["metrics"] = json.dumps(record.get("metrics", {}))
    for key in ("command", "time"):
        line[key] = record.get(key, "")
    line["environment"] = json.dumps(record.get("environment", {}))
    return line


def _curve_lines(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(records):
        run = {"run": number, **_entry(record), "seed": record["seed"]}
        for values in zip(*(record["curve"][name] for name in CURVES), strict=True):
            yield {**run, **dict(zip(CURVES, values, strict=True))}

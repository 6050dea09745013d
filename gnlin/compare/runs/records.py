"""The store of runs: a directory with ``records.jsonl`` and ``task.json``.

``records.jsonl`` has a JSON object on each line, one for each run. ``task.json`` has the facts of
each task.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import filelock

# One run, as a line of ``records.jsonl`` gives it; null is NaN in its curve.
Record = dict[str, Any]

SCHEMA = 1
RECORDS = "records.jsonl"
FACTS = "task.json"
_BEGINNING = '{"schema"'  # of every line
CURVES = ("step", "cost", "seconds", "loss", "quality", "network_loss", "network_quality")
# The fields of every record, by type.
_FIELDS = {
    **dict.fromkeys(("task", "contestant", "label", "status", "reason", "command"), str),
    **dict.fromkeys(("options", "setting", "curve", "environment"), dict),
    **dict.fromkeys(("seed", "steps"), int),
    **dict.fromkeys(("work", "seconds", "compile_seconds", "cost_per_step"), (int, float)),
    "grid": list,
}


class RecordsError(Exception):
    """A directory that cannot be read or written; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """The properties of a task that a report needs.

    Attributes:
        name: its name in the records.
        summary: a sentence or two that describe it.
        target: training loss up to which steps and work are counted.
        quality_name: the measure on held-out data, with its unit: ``accuracy, %``.
        higher_is_better: whether more of it is better.
        solved: value of it from which the task counts as solved.
        data: fingerprint of a task from outside; empty for those of the package.
    """

    name: str
    summary: str
    target: float
    quality_name: str
    higher_is_better: bool
    solved: float
    data: str = ""

    def is_solved(self, value: float) -> bool:
        return value >= self.solved if self.higher_is_better else value <= self.solved


class Records:
    """The runs of one comparison, each on disk as soon as it ends.

    Args:
        directory: the place of the files, made if need be; `None` to keep the runs in memory.

    Attributes:
        runs: all of them. A run of the same entry, setting and seed replaces an earlier one, so
            that a failed run can be repeated.
        cut_short: whether the last line was incomplete, as after a crash. The line is removed, and
            its run must be made again.

    Raises:
        RecordsError: the directory is in use, cannot be written to, or has lines that are no
            records of this version.
    """

    def __init__(self, directory: Path | None = None):
        self.path = None if directory is None else directory / RECORDS
        self.cut_short = False
        self._runs: dict[tuple, Record] = {}
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(directory / ".lock", timeout=0)
            self._lock.acquire()
            self._file = (directory / RECORDS).open("a+b", buffering=0)
        except filelock.Timeout:
            raise RecordsError(
                f"{directory} is in use by another comparison; wait for it or take another --out"
            ) from None
        except OSError as error:
            raise RecordsError(
                f"cannot write to {directory}: {error.strerror}; take another --out"
            ) from None
        try:
            self.cut_short = self._cut()
            self._runs = {_key(record): record for record in read(directory)}
        except RecordsError:
            self.close()
            raise

    @property
    def runs(self) -> list[Record]:
        return list(self._runs.values())

    def find(self, record: Record) -> Record | None:
        """The run with the same task, entry, setting and seed, unless it failed."""
        found = self._runs.get(_key(record))
        return None if found is None or found["status"] == "failed" else found

    def add(self, record: Record) -> None:
        """Keep a run, on disk before anything else happens."""
        if self.path is not None:
            line = json.dumps(_without_nan(record), allow_nan=False).encode() + b"\n"
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                raise RecordsError(
                    f"cannot write to {self.path}: {error.strerror}; "
                    "make room and run the same command"
                ) from None
        self._runs[_key(record)] = record

    def close(self) -> None:
        if self.path is not None:
            try:
                self._file.close()
            finally:
                self._lock.release()

    def _cut(self) -> bool:
        """Remove an incomplete last line."""
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end == len(content) or not _began(content[end:].decode(errors="replace")):
            return False  # a foreign file is left as it is, for `read` to refuse
        self._file.truncate(end)
        return True


def read(directory: Path) -> list[Record]:
    """All runs in a directory. A run of the same entry, setting and seed replaces an earlier one.

    Raises:
        RecordsError: there are none, or a line is no record of this version.
    """
    path = directory / RECORDS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise RecordsError(
            f"no {RECORDS} in {directory}; `gnlin compare TASK --out {directory}` makes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"cannot read {path}: {error}") from None
    runs = {}
    for number, line in enumerate(lines, start=1):
        if not line or (number == len(lines) and _began(line)):
            continue  # the text after the last newline was cut short
        record = _record(path, number, line)
        runs[_key(record)] = record
    return list(runs.values())


def write_facts(directory: Path, facts: TaskFacts) -> None:
    """Add the facts of a task to those that the directory has already.

    Raises:
        RecordsError: the directory has runs of another task of that name, or cannot be written to.
    """
    known = read_facts(directory)
    before = dataclasses.replace(known.get(facts.name, facts), summary=facts.summary)
    if before != facts and (directory / RECORDS).stat().st_size > 0:
        raise RecordsError(
            f"{directory} has runs of another task {facts.name!r}, with other data, target or "
            "quality; take another name, or another --out"
        )
    known[facts.name] = facts
    content = {name: dataclasses.asdict(fact) for name, fact in known.items()}
    temporary = directory / f".{FACTS}"
    try:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        temporary.replace(directory / FACTS)
    except OSError as error:
        raise RecordsError(
            f"cannot write to {directory}: {error.strerror}; make room or take another --out"
        ) from None


def read_facts(directory: Path) -> dict[str, TaskFacts]:
    """The facts of the tasks that a directory has runs of, by name.

    Raises:
        RecordsError: the file cannot be read.
    """
    path = directory / FACTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {name: TaskFacts(**fact) for name, fact in content.items()}
        for fact in known.values():
            if not isinstance(fact.target, int | float) or not isinstance(fact.solved, int | float):
                raise ValueError("target and solved are numbers")
        return known
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecordsError(
            f"cannot read {path}: {error}; delete it and run the comparison's command again"
        ) from None


def _began(tail: str) -> bool:
    """Whether the text after the last newline is the beginning of a record."""
    return tail.startswith(_BEGINNING) or _BEGINNING.startswith(tail)


def _record(path: Path, number: int, line: str) -> Record:
    """The record on a line of the file.

    Raises:
        RecordsError: it is no record, of another version, or incomplete.
    """
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        raise RecordsError(
            f"{where} is no record of gnlin compare: it is not JSON. "
            "Delete the line or take another --out"
        ) from None
    if not isinstance(record, dict) or "schema" not in record:
        raise RecordsError(f"{where} is no record of gnlin compare. Take another --out")
    if record["schema"] != SCHEMA:
        raise RecordsError(
            f"{where} has schema {record['schema']!r}, and this version of gnlin reads {SCHEMA}. "
            "Take another --out, or the version of gnlin that wrote it"
        )
    if missing := _missing(record):
        raise RecordsError(
            f"{where} lacks {', '.join(missing)}. Delete the line: its run will be done again"
        )
    for name, values in record["curve"].items():
        record["curve"][name] = [math.nan if value is None else value for value in values]
    metrics = record.get("metrics", {})  # records of older versions have none
    record["metrics"] = {name: math.nan if v is None else v for name, v in metrics.items()}
    return record


def _missing(record: Record) -> list[str]:
    """The fields of a record that are missing or of a wrong type."""
    missing = sorted(
        name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind)
    )
    curve = record["curve"] if isinstance(record.get("curve"), dict) else {}
    missing += [name for name in CURVES if not isinstance(curve.get(name), list)]
    if not missing:
        lengths = {len(values) for values in curve.values()}
        if len(lengths) > 1 or (record["status"] != "failed" and not curve["step"]):
            missing.append("values in its curve")
    if not isinstance(record.get("metrics", {}), dict):
        missing.append("metrics")
    return missing


def _key(record: Record) -> tuple:
    """Equal for runs of the same entry, setting and seed."""
    parts = [record[name] for name in ("task", "contestant", "options", "setting", "seed")]
    return tuple(json.dumps(part, sort_keys=True) for part in parts)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Where runs are kept: a directory with ``records.jsonl``, a JSON object on each line, and ``task.json``."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import filelock

from gnlin.compare.report.summary import Record, TaskFacts

SCHEMA = 1
RECORDS = "records.jsonl"
FACTS = "task.json"
_BEGINNING = '{"schema"'  # of every line
CURVES = ("step", "cost", "seconds", "loss", "quality", "network_loss", "network_quality")
# What a record must have, and of what type.
_FIELDS = {
    **dict.fromkeys(("task", "contestant", "label", "status", "reason", "command"), str),
    **dict.fromkeys(("options", "setting", "curve", "environment"), dict),
    **dict.fromkeys(("seed", "steps"), int),
    **dict.fromkeys(("work", "seconds", "compile_seconds", "cost_per_step"), (int, float)),
    "grid": list,
}


class RecordsError(Exception):
    """A directory of records that cannot be read, or written; the message names the file and the remedy."""


class Records:
    """The runs of one comparison, each on disk as soon as it ends.

    Args:
        directory: where they are kept, made if need be; `None` to keep them in memory.

    Attributes:
        runs: all of them. Of runs of the same entry, setting and seed the last, so that a failed
            one can be repeated.
        cut_short: whether the last line was incomplete, as after a crash; it is removed, and its
            run is to be done again.

    Raises:
        RecordsError: the directory is in use, cannot be written to, or holds what is no record of
            this version.
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
                    f"cannot write to {self.path}: {error.strerror}; make room and run the same command"
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
    """All runs in a directory, the last of those that are equal.

    Raises:
        RecordsError: there are none, or what is there is no record of this version.
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
            continue  # what follows the last newline was cut short
        record = _record(path, number, line)
        runs[_key(record)] = record
    return list(runs.values())


def write_facts(directory: Path, facts: TaskFacts) -> None:
    """Note what a task is, beside those that the directory has already.

    Raises:
        RecordsError: the directory has runs of another task of that name, or cannot be written to.
    """
    known = read_facts(directory)
    before = dataclasses.replace(known.get(facts.name, facts), summary=facts.summary)
    if before != facts and (directory / RECORDS).stat().st_size > 0:
        raise RecordsError(
            f"{directory} has runs of another task {facts.name!r}, with other data, target or quality; take another "
            "name, or another --out"
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
    path = directory / FACTS
    try:
        known = {
            name: TaskFacts(**fact)
            for name, fact in json.loads(path.read_text(encoding="utf-8")).items()
        }
        if not all(
            isinstance(fact.target, (int, float)) and isinstance(fact.solved, (int, float))
            for fact in known.values()
        ):
            raise ValueError("target and solved are numbers")
        return known
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecordsError(
            f"cannot read {path}: {error}; delete it and run the comparison's command again"
        ) from None


def _began(tail: str) -> bool:
    """Whether what stands behind the last newline is the beginning of a record."""
    return tail.startswith(_BEGINNING) or _BEGINNING.startswith(tail)


def _record(path: Path, number: int, line: str) -> Record:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        raise RecordsError(
            f"{where} is no record of gnlin compare: it is not JSON. Delete the line or take another --out"
        ) from None
    if not isinstance(record, dict) or "schema" not in record:
        raise RecordsError(f"{where} is no record of gnlin compare. Take another --out")
    if record["schema"] != SCHEMA:
        raise RecordsError(
            f"{where} has schema {record['schema']!r}, and this version of gnlin reads {SCHEMA}. Take another --out, "
            "or the version of gnlin that wrote it"
        )
    wrong = sorted(name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind))
    curve = record["curve"] if "curve" in record and "curve" not in wrong else {}
    wrong += [name for name in CURVES if not isinstance(curve.get(name), list)]
    if not wrong and (
        len(set(map(len, curve.values()))) > 1
        or (record["status"] != "failed" and not curve["step"])
    ):
        wrong = ["values in its curve"]
    if not isinstance(record.get("metrics", {}), dict):  # records of older versions have none
        wrong.append("metrics")
    if wrong:
        raise RecordsError(
            f"{where} lacks {', '.join(wrong)}. Delete the line: its run will be done again"
        )
    record["curve"] = {
        name: [math.nan if v is None else v for v in values] for name, values in curve.items()
    }
    record["metrics"] = {
        name: math.nan if v is None else v for name, v in record.get("metrics", {}).items()
    }
    return record


def _key(record: Record) -> tuple:
    parts = [record[name] for name in ("task", "contestant", "options", "setting", "seed")]
    return tuple(json.dumps(part, sort_keys=True) for part in parts)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

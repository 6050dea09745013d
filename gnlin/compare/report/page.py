"""Rows to one page with everything: tables, figures, definitions."""

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape

from gnlin.compare.report.csv_files import save_csv
from gnlin.compare.report.figures import Picture, pictures
from gnlin.compare.report.summary import Spread, incomplete, summarise
from gnlin.compare.report.wording import brief, like, setting_in_words, small, trouble, whole
from gnlin.compare.runs.records import Record, TaskFacts
from gnlin.compare.runs.tuning import finished

PAGE = "report.html"


def write(directory: Path, records: Sequence[Record], tasks: Mapping[str, TaskFacts]) -> Path:
    """Write DIR/report.html, and beside it DIR/figures and the CSV files.

    The page needs none of the other files.

    Args:
        directory: their place; made if need be.
        records: runs of any number of tasks.
        tasks: the facts of these tasks, by name.

    Returns:
        The page.
    """
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    save_csv(directory, records, tasks)
    environments = _distinct(record.get("environment", {}) for record in records)
    text = _template().render(
        sections=_sections(directory, records, tasks),
        commands=_distinct(record.get("command", "") for record in records),
        environments=environments,
        differing=_differing(environments),
        days=sorted({record["time"][:10] for record in records if record.get("time")}),
        parts=_parts,
        trouble=trouble,
        small=small,
        like=like,
        whole=whole,
        brief=brief,
    )
    page = directory / PAGE
    page.write_text(text, encoding="utf-8")
    return page


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"in_words": setting_in_words, "with_breaks": _with_breaks}
    return environment.get_template(f"{PAGE}.j2")


def _sections(
    directory: Path, records: Sequence[Record], tasks: Mapping[str, TaskFacts]
) -> list[dict[str, Any]]:
    """The contents of the page, one section for each task."""
    rows, undone = summarise(records, tasks), incomplete(records)
    sections = []
    for name in dict.fromkeys(record["task"] for record in records):
        own = [row for row in rows if row.task == name]
        drawn = [_embed(picture, directory, name) for picture in pictures(own, tasks[name])]
        section = {
            "task": tasks[name],
            "rows": own,
            "pictures": drawn,
            "incomplete": [group for group in undone if group.task == name],
            "trouble": _troubles(record for record in records if record["task"] == name),
        }
        sections.append(section)
    return sections


def _embed(picture: Picture, directory: Path, task: str) -> dict[str, Any]:
    """Save a figure as PNG and SVG, and return the SVG as a data URI."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{task}-{picture.name}")
    drawn = io.BytesIO()
    folder, figure = directory / "figures", picture.figure
    # The same records give the same files: no date, and identifiers that depend on the contents
    # alone.
    with matplotlib.rc_context({"svg.hashsalt": stem, "svg.fonttype": "path"}):
        tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05}
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None}, **tight)
        figure.savefig(folder / f"{stem}.png", dpi=150, metadata={"Software": None}, **tight)
    (folder / f"{stem}.svg").write_bytes(drawn.getvalue())
    source = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    return {"picture": picture, "source": source}


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
            key = record["label"], record["status"], record["reason"]
            run = f"{setting_in_words(record['setting'])}, seed {record['seed']}".lstrip(", ")
            found.setdefault(key, []).append(run)
    troubles = []
    for (label, status, reason), runs in found.items():
        troubles.append({"label": label, "status": status, "reason": reason, "runs": runs})
    return troubles


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
    """``jax 0.10.2, 0.12.0`` for each property that is not the same in all of them."""
    differing = []
    for name in dict.fromkeys(name for environment in environments for name in environment):
        known = _distinct(str(environment.get(name, "unknown")) for environment in environments)
        if len(known) > 1:
            differing.append(f"{name} {', '.join(known)}")
    return differing

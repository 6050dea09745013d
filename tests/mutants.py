"""Errors that the tests must notice: each mutant in `mutants.toml` changes one line of the package.

    python tests/mutants.py                 # all of them: tens of minutes
    python tests/mutants.py --list
    python tests/mutants.py --only momentum --only "prox loss"

A mutant is applied to a copy of the package in a temporary folder, and its tests are run there. It
is caught where one of them fails. A survivor needs a test, or a sentence in the field `equivalent`
that says why it changes nothing. The old text must occur exactly once in the file.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS = 900  # for the tests of one mutant, lest a loop is endless


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # below gnlin/
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest, below tests/
    equivalent: str = ""  # why no test can notice it


def load() -> list[Mutant]:
    records = tomllib.loads((ROOT / "tests/mutants.toml").read_text())["mutant"]
    mutants = [Mutant(**{**record, "tests": tuple(record["tests"])}) for record in records]
    names = [mutant.name for mutant in mutants]
    if len(set(names)) < len(names):
        raise LookupError(f"names occur twice: {sorted({n for n in names if names.count(n) > 1})}")
    return mutants


def applied(folder: pathlib.Path, mutants: list[Mutant]) -> list[str]:
    """The text of each mutant's file, with the error in it.

    Raises:
        LookupError: the old text of a mutant does not occur once; all such mutants are named.
    """
    texts, stale = [], []
    for mutant in mutants:
        text = (folder / "gnlin" / mutant.file).read_text()
        if (count := text.count(mutant.old)) != 1:
            stale.append(f"{mutant.name!r}: {count} times in {mutant.file}")
        texts.append(text.replace(mutant.old, mutant.new))
    if stale:
        raise LookupError("old texts do not occur once:\n" + "\n".join(stale))
    return texts


def copy_of_the_package(folder: pathlib.Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "mutants.toml")
    for name in ("gnlin", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


class Outcome(NamedTuple):
    code: int  # of pytest: 0 where all tests passed, 1 where one failed
    output: str


def run(folder: pathlib.Path, tests: tuple[str, ...]) -> Outcome:
    """Run tests on the copy; too long a run counts as a failure."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    # No bytecode: two mutants of one size in one second would be taken for the same file.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [*command, *(f"tests/{test}" for test in tests)]
    how: dict[str, Any] = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run(arguments, timeout=SECONDS, **how)
    except subprocess.TimeoutExpired:
        return Outcome(1, f"longer than {SECONDS} s")
    return Outcome(done.returncode, done.stdout + done.stderr)


def check_the_copy(folder: pathlib.Path, mutants: list[Mutant]) -> None:
    """Raise unless the copy is the package that tests see, and its tests pass."""
    where = [sys.executable, "-c", "import gnlin; print(gnlin.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    found = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True)
    if pathlib.Path(found.stdout.strip()).parent != folder / "gnlin":
        raise RuntimeError(f"the tests would import {found.stdout.strip() or found.stderr}")
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    for test in tests:
        if (outcome := run(folder, (test,))).code:
            raise RuntimeError(f"{test} fails without a mutant: {outcome.output[-2000:]}")


def hunt(mutants: list[Mutant], *, baseline: bool) -> int:
    """Print the fate of each mutant; the number of those that a test should have caught."""
    caught = survived = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve()
        copy_of_the_package(folder)
        texts = applied(folder, mutants)
        if baseline:
            check_the_copy(folder, mutants)
        for mutant, text in zip(mutants, texts, strict=True):
            file, begin = folder / "gnlin" / mutant.file, time.monotonic()
            original = file.read_text()
            file.write_text(text)
            try:
                outcome = run(folder, mutant.tests)
            finally:
                file.write_text(original)
            fate = {0: "SURVIVED", 1: "caught"}.get(outcome.code, "BROKEN")
            if fate == "SURVIVED" and mutant.equivalent:
                fate = "equivalent"
            if fate == "BROKEN":  # pytest itself did not get as far as the tests
                print(outcome.output[-2000:])
            caught += fate == "caught"
            survived += fate not in ("caught", "equivalent")
            seconds = time.monotonic() - begin
            print(f"{fate:10}  {seconds:4.0f} s  {mutant.file}: {mutant.name}", flush=True)
    print(f"caught {caught} of {len(mutants)}")
    return survived


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="part of a name; repeatable"
    )
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass")
    options = parser.parse_args()
    mutants = load()
    if options.only:
        mutants = [each for each in mutants if any(part in each.name for part in options.only)]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.file}: {mutant.name}  [{' '.join(mutant.tests)}]")
        return 0
    return bool(hunt(mutants, baseline=not options.no_baseline))


if __name__ == "__main__":
    sys.exit(main())

"""``python -m gnlin`` and the command ``gnlin``."""

import os
import signal
import sys

# What the extra `compare` brings; the core needs none of it.
_EXTRA = {"filelock", "jinja2", "loky", "matplotlib", "numpy", "rich", "sklearn", "typer"}


def main() -> None:
    """Run the command line, or say in one line what it lacks."""
    try:
        _run()
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            _interrupted()
        raise


def _run() -> None:
    try:
        from gnlin.compare.cli import app

        app(prog_name="gnlin")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.exit(
            f"The command line needs {error.name}, which is not installed: "
            'pip install "gnlin[compare]"'
        )


def _interrupted() -> None:
    """End at once: XLA may still be compiling on a thread of its own, which an orderly exit would
    crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()

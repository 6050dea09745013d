"""``python -m gnlin`` and the command ``gnlin``."""

import sys

# What the extra `compare` brings; the core needs none of it.
_EXTRA = {"matplotlib", "numpy", "rich", "sklearn", "typer"}


def main() -> None:
    """Run the command line, or say in one line what it lacks."""
    try:
        from gnlin.compare.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f'The command line needs {error.name}, which is not installed: pip install "gnlin[compare]"')
    app(prog_name="gnlin")


if __name__ == "__main__":
    main()

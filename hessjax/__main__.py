"""Lets `hessjax` and `python -m hessjax` run the command, or say what it needs."""

import sys

_EXTRAS = ("matplotlib", "sklearn", "typer")


def main() -> None:
    """Run the command; exit with 2 where its optional packages are missing."""
    try:
        from hessjax.cli import app

        app(prog_name="hessjax")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        print(f"hessjax: the command needs `{error.name}`: pip install 'hessjax[tour]'", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()

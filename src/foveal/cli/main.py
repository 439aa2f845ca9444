"""The entry point: gathers the commands and turns errors into one line and an exit code.

Exit codes: 0 done, 2 a mistake in what was asked (usage, a missing file, a value out of range), 130 Ctrl-C.
"""

import logging
import sys
from typing import Annotated

import typer

import foveal
from foveal.cli import chat, doctor, generate

app = typer.Typer(
    name="foveal",
    help="Language models that attend only where it matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"foveal {foveal.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; every mistake of the user's ends as one line on standard error and exit code 2."""
    logging.basicConfig(format="foveal: %(message)s")  # to standard error
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"foveal: {_in_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _in_one_line(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

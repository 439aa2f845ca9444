"""The entry point: gathers the commands and turns errors into one line and an exit code.

Exit codes: 0 done, 2 a mistake in what was asked (usage, a missing file, a value out of range), 130 Ctrl-C.
"""

import logging
import sys
from typing import Annotated, Any

import typer

import foveal
from foveal.cli import chat, doctor, eval, generate, plan, serve, train

app = typer.Typer(
    name="foveal",
    help="Language models that attend only where it matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("eval")(eval.evaluate)
app.command("train")(train.train)


# The base of all that is wrong with a command line, which typer does not export.
_UsageError: Any = typer.BadParameter.__mro__[1]


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
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not _is_mistake(error):
            raise
        # Without arguments the help has been printed, and there is nothing to add.
        if line := _in_one_line(error):
            print(f"foveal: {line}", file=sys.stderr)
        sys.exit(2)


def _is_mistake(error: Exception) -> bool:
    """Whether what was asked, or a file, is wrong; anything else is our own bug and deserves its traceback."""
    jinja2 = sys.modules.get("jinja2")  # loaded once a model's chat template has been read
    return isinstance(error, ValueError | OSError | FloatingPointError | _UsageError) or (
        jinja2 is not None and isinstance(error, jinja2.TemplateError)
    )


def _in_one_line(error: Exception) -> str:
    if isinstance(error, _UsageError):
        return " ".join(error.format_message().split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

"""The command line: arguments in, text out. The only room that prints text for people; may import everything but tiny.training.

Text goes to standard output; progress, timings and errors to standard error. Exit status: 0; 1 for a failure, explained in one line; 2 for
wrong usage; 130 after Ctrl-C.
"""

import contextlib
import io
import json
import sys
import warnings
from typing import Annotated

import typer

from refimpl.cli import cache, chat, files, glass, notebooks, run, serve  # noqa: F401  (each adds its commands to the app)
from refimpl.cli.app import Failure, abandon_output, app, errors, write
from refimpl.cli.lab import compare, evaluate, fit, judge, measure, trace, verify  # noqa: F401


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, typer.Option("-V", "--version", help="print the version and exit")] = False):
    if version:
        import refimpl

        print(refimpl.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        errors.print(context.get_help())
        raise typer.Exit(2)


def main():
    """Runs the command line of this process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # a character that the terminal's encoding lacks must not end a text
    sys.exit(status())


def status(args: list[str] | None = None) -> int:
    """Runs `refimpl ARGS` (default: those of this process). Returns the exit status; an error is one line on standard error."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: errors.print(f"note: {message}")
        try:
            code = app(args, prog_name="refimpl", standalone_mode=False)
            sys.stdout.flush()
            return code or 0
        except BrokenPipeError:
            abandon_output()
            return 1
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except typer.Exit as e:
            return e.exit_code
        except Exception as e:
            return complain(e, "--json" in (sys.argv[1:] if args is None else args))


def complain(e: Exception, as_json: bool = False) -> int:
    """Prints an error as one line, and as a JSON object on standard output if asked for. Returns the exit status.

    An unexpected error keeps its traceback.
    """
    from refimpl.lab.failures import FAILURES, line_of
    from refimpl.model.cache import ContextFull

    usage_error = typer.BadParameter.__base__       # typer carries a copy of click or uses the installed one, by its version
    if isinstance(e, usage_error):
        text = e.format_message().removeprefix("Invalid value: ")       # without an option's name it says nothing
    elif isinstance(e, (*FAILURES, ContextFull, Failure)):
        text = line_of(e)
    else:
        raise e
    errors.print(f"refimpl: {text}")
    if as_json:
        with contextlib.suppress(OSError):
            write(json.dumps({"error": text}) + "\n")
    return 2 if isinstance(e, usage_error) else 1

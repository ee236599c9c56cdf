# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The application that every verb belongs to, options they share, and errors as one line and an exit code."""

from __future__ import annotations

import functools
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, get_args, get_origin

import typer

from deflow_torchrl import __version__
from deflow_torchrl.errors import InputError, RunError, RunInterrupted, one_line

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]

app = typer.Typer(
    name="deflow",
    help="DeFlow: offline reinforcement learning with a flow prior, a trust-region refinement and a twin critic.",
    epilog="Start with `deflow demo --quick`. Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def verb(
    group: typer.Typer, name: str | None = None, *, epilog: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a function a verb of ``group``.

    Parameters are arguments, keyword-only ones options; a false one is a flag. The section ``Args:`` at the end of the docstring
    holds the help of each, after its name and, where it has one, its METAVAR; the rest of the docstring is the verb's help.

    Its result is printed as one line of JSON where ``--json`` is given. Errors that a user can cause become one line on
    standard error and an exit code.
    """

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            try:
                result = function(**options)
            except InputError as error:
                _exit(error, EXIT_BAD_INPUT)
            except RunError as error:
                _exit(error, EXIT_FAILED)
            except RunInterrupted as error:
                _exit(error, EXIT_INTERRUPTED)
            except RuntimeError as error:
                if "MUJOCO_GL" not in str(error):  # which mujoco reads when it is imported, also by torchrl
                    raise
                _exit(f"{one_line(error)}; glfw draws on a display, egl without one", EXIT_BAD_INPUT)
            except KeyboardInterrupt:
                _exit(
                    "interrupted; finished parts are kept; the same command goes on or starts again",
                    EXIT_INTERRUPTED,
                )
            if options.get("json_") and result is not None:
                print(json.dumps(result))

        text, _, arguments = (inspect.getdoc(function) or "").partition("\nArgs:\n")
        run.__signature__ = _with_help(function, inspect.cleandoc(arguments))  # type: ignore[attr-defined]
        group.command(name, help=text, epilog=epilog)(run)
        return run

    return register


def _with_help(function: Callable[..., Any], documented: str) -> inspect.Signature:
    """The function's signature, each parameter annotated with the METAVAR and the help that are documented."""
    entries = re.findall(r"^(\w+)(?: ([^:\n]+))?: (.*(?:\n .*)*)", documented, re.M)
    texts = {name: {"metavar": metavar or None, "help": " ".join(text.split())} for name, metavar, text in entries}
    signature = inspect.signature(function, eval_str=True)
    parameters = []
    for name, parameter in signature.parameters.items():
        if name in texts:
            annotation, option = parameter.annotation, parameter.kind is parameter.KEYWORD_ONLY
            info = typer.Option(*([f"--{name.replace('_', '-')}"] if parameter.default is False else ()))
            info = info if option else typer.Argument()
            if get_origin(annotation) is Annotated:
                annotation, info = get_args(annotation)
            vars(info).update(texts[name])
            parameter = parameter.replace(annotation=Annotated[annotation, info])  # noqa: PLW2901
        parameters.append(parameter)
    return signature.replace(parameters=parameters)


def command_line() -> str:
    """The command as the user gave it, for records."""
    return shlex.join(["deflow", *sys.argv[1:]])


def _exit(message: object, code: int) -> NoReturn:
    print(f"deflow: {message}", file=sys.stderr)
    raise SystemExit(code)

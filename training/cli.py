"""`convoy-train`: data in, a trained run or a bundle out.

Owns the command line and how a fault is told: one sentence on stderr and exit code 2. PyTorch is imported by the
sub-command that needs it, so that `--help` answers at once.
"""

import argparse
import atexit
import os
import shlex
import sys
from typing import NoReturn

from app.errors import ConvoyError
from training.commands import (
    bench,
    calibrate,
    card,
    check,
    compress,
    evaluate,
    export,
    fetch,
    few_shot,
    find_rate,
    import_weights,
    predict,
    train,
)
from training.errors import RecipeError
from training.names import is_text

COMMANDS = (
    fetch,
    check,
    card,
    find_rate,
    train,
    bench,
    evaluate,
    predict,
    export,
    import_weights,
    few_shot,
    calibrate,
    compress,
)
USER_FAULT = 2
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parse(given)
        status: int | None = options.run(options)
    except ConvoyError as error:
        sys.stderr.write(f"convoy-train: {error.message}\n")
        return USER_FAULT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "app", "training"):
            raise
        sys.stderr.write(f"convoy-train: {package} is not installed here: `make training` sets up all it needs.\n")
        return USER_FAULT
    except MemoryError as error:
        told = f" ({error})" if str(error) else ""
        sys.stderr.write(f"convoy-train: Memory is too small for this{told}: give smaller images or fewer of them.\n")
        return USER_FAULT
    except OSError as error:  # a full disk, a folder that may not be written
        sys.stderr.write(f"convoy-train: {error.filename or 'A file'} cannot be used: {error.strerror or error}.\n")
        return USER_FAULT
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"convoy-train: {str(stop) or 'interrupted.'}\n")
        return INTERRUPTED
    return status or 0


def command() -> NoReturn:
    """Be the process of this command line, and end it with its exit code."""
    status = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # DistributedDataParallel (torch 2.13) keeps the process group alive, and with it gloo's threads, whatever is
        # destroyed. One that frees its last tensor while Python shuts down aborts the process: the training was done,
        # yet torchrun reads a fault (1 of 24 on a busy machine). So Python is not shut down.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _Parser(argparse.ArgumentParser):
    """Tells a wrong command line as any other fault is told: argparse would print its usage first."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message.removeprefix('argument ').rstrip('.')}.")


def _parse(given: list[str]) -> argparse.Namespace:
    for argument in given:
        if not is_text(argument):
            raise RecipeError(f"The argument {argument!a} is not UTF-8: rename the file or folder.")
    options = _parser().parse_args(given)
    options.command_line = shlex.join(["convoy-train", *given])
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convoy-train", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    command()

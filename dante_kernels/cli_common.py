"""What the commands of `dante` share: one line for each mistake, and versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from typing import NoReturn


class UsageError(ValueError):
    """An option is wrong, as a command itself can see."""


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print what a user can cause as one line, and exit."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        raise
    except UsageError as error:
        fail(str(error), 2)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        message = str(error).partition("\nException raised from")[0]  # there torch goes on with a C++ backtrace
        fail(naming_the_option(message) or type(error).__name__, 1)


def fail(message: str, status: int) -> NoReturn:
    """Say it in one line, and exit."""
    print("dante: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)


def naming_the_option(message: str) -> str:
    """A message of the library about an argument (`inner_steps: ...`) as one about the option (`--inner-steps: ...`)."""
    word, colon, rest = message.partition(": ")
    from .cli_train import train

    options = inspect.signature(train).parameters.keys() - {"dataset"}
    return f"--{word.replace('_', '-')}: {rest}" if colon and word in options else message


def expect(holds: bool, option: str, expected: str, got: object) -> None:
    """Refuse an option for which that does not hold."""
    if not holds:
        raise UsageError(f"{option}: expected {expected}, got {got!r}")


def version_of(package: str) -> str:
    """Of an installed package; of this one also where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "dante_kernels":
            from . import __version__

            return __version__
        return "not installed"

"""How a tool ends: as the command line does, in one line where usage or input is wrong."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NoReturn

from ditcast.errors import ConfigError, DitcastError


class Parser(argparse.ArgumentParser):
    """Arguments whose errors are a `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        """Wrong usage."""
        raise ConfigError(message)


def tool(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Let a tool's `main` exit with 2 for wrong usage or input."""

    def decorate(main: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def wrapped() -> None:
            try:
                main()
            except DitcastError as err:
                print(f"{name}: error: " + " ".join(str(err).split()), file=sys.stderr)
                sys.exit(2)

        return wrapped

    return decorate

"""The errors a user can meet: each message says what, got, expected, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType


class DitcastError(Exception):
    """Base of all errors that are a user's to mend; the command line exits with 2."""


class ConfigError(DitcastError):
    """A recipe, a flag or a request that cannot be."""


class UnsupportedError(DitcastError):
    """A model, scheduler or backend that ditcast does not handle."""


class MissingDependencyError(DitcastError):
    """An optional package that this command needs is not installed."""


class BundleError(DitcastError):
    """A bundle that is damaged, stale, incomplete or not the expected one."""


class ParityError(DitcastError):
    """An exported graph that does not compute what the model computes; commands exit with 1."""


def optional(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        MissingDependencyError: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f"Package {package!r} is needed here and cannot be imported ({err}). "
            f"Install it with: pip install 'ditcast[{extra}]'"
        ) from err

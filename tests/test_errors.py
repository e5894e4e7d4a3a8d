"""Optional packages: what is missing, and which extra brings it."""

from __future__ import annotations

import json

import pytest

from ditcast import errors


def test_a_package_that_is_there() -> None:
    """Comes as the module itself."""
    assert errors.optional("json", "report") is json


def test_a_package_that_is_missing() -> None:
    """The message names the package, not the sub-module, and the extra."""
    match = r"Package 'no_such_package' is needed here .*pip install 'ditcast\[report\]'"
    with pytest.raises(errors.MissingDependencyError, match=match):
        errors.optional("no_such_package.io", "report")


def test_every_error_is_the_users_to_mend() -> None:
    """The command line turns exactly these into one line and exit code 2."""
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(kinds) == 6
    assert all(issubclass(kind, errors.DitcastError) for kind in kinds)

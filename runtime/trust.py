"""Which plans may be loaded: a plan is code, so only those that this user's own key has signed.

The manifest's hash says that a plan is the one that was put into the bundle; it does not say by
whom. The key lies in `$DITCAST_KEY`, else in `$XDG_CONFIG_HOME/ditcast/engine.key`, else in
`~/.config/ditcast/engine.key`, and is made when first needed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from ditcast.errors import BundleError, ConfigError
from ditcast.manifest import Engine, FileEntry

KEY_BYTES = 32
PRIVATE = 0o600


def key_file() -> Path:
    """Where this user's key is."""
    if chosen := os.environ.get("DITCAST_KEY"):
        return Path(chosen)
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "ditcast" / "engine.key"


def _key() -> bytes:
    """The key, made if there is none.

    Raises:
        ConfigError: others can read it, or it is no key.
    """
    path = key_file()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
    mode, found = path.stat().st_mode & 0o777, path.read_bytes()
    if mode & 0o077:
        raise ConfigError(
            f"key: {path} has mode {mode:04o}, expected {PRIVATE:04o}: others could sign plans; "
            f"remove it, and build the engines again"
        )
    if len(found) != KEY_BYTES:
        raise ConfigError(
            f"key: {path} has {len(found)} bytes, expected {KEY_BYTES}; remove it, and build the "
            "engines again"
        )
    return found


def sign(engine: Engine, plan: FileEntry) -> str:
    """The signature of an engine's description together with its plan."""
    values = engine.model_dump(mode="json", exclude={"signature"})
    text = json.dumps([values, plan.model_dump()], sort_keys=True)
    return hmac.new(_key(), text.encode(), hashlib.sha256).hexdigest()


def check_signature(engine: Engine, plan: FileEntry) -> None:
    """Refuse a plan that somebody else has built.

    Raises:
        BundleError: its signature is not by this user's key.
    """
    if not hmac.compare_digest(sign(engine, plan), engine.signature):
        raise BundleError(
            f"engine: {engine.path} is not signed by this user's key ({key_file()}), and a plan is "
            f"code; build it here with: ditcast build BUNDLE --backend {engine.backend}, or say "
            "that you trust who built it with --trust-engines"
        )

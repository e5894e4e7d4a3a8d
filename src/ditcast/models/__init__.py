"""Model families behind one interface. To add one: an adapter file, and a line in `ADAPTERS`."""

from __future__ import annotations

from ditcast.models.base import Adapter, LoadedModel, describe
from ditcast.models.source import ADAPTERS, load

__all__ = ["ADAPTERS", "Adapter", "LoadedModel", "describe", "load"]

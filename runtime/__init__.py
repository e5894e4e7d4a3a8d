"""Runtime: a bundle becomes samples, audits and measurements; never imports torch."""

from __future__ import annotations

from ditcast.runtime.pipeline import Pipeline, Step

__all__ = ["Pipeline", "Step"]

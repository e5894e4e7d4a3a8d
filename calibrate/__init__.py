"""Calibration: trajectories of the trained model become scales (needs torch)."""

from __future__ import annotations

from ditcast.calibrate.stage import calibrate, check

__all__ = ["calibrate", "check"]

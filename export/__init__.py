"""Export: model and calibration become ONNX graphs with Q/DQ and a control loop (needs torch)."""

from __future__ import annotations

from ditcast.export.stage import to_onnx

__all__ = ["to_onnx"]

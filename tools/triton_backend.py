"""Stands in for Triton's onnxruntime backend where there is none: `triton_check.py` installs it.

Triton takes a `model.py` in the folder of a backend for that backend, and runs it by its Python
backend. So the repository is served as it is, with the checks that Triton makes of `config.pbtxt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """`model.onnx` in a session with default options."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph; its inputs have to be those of the configuration."""
        options = onnxruntime.SessionOptions()
        config = json.loads(args["model_config"])
        threads = config["parameters"]["intra_op_thread_count"]["string_value"]
        options.intra_op_num_threads = int(threads)
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.ranks = {x.name: len(x.shape) for x in self.session.get_inputs()}
        named = [entry["name"] for entry in config["input"]]
        if sorted(named) != sorted(self.ranks):
            raise pb_utils.TritonModelException(f"inputs: got {named}, expected {[*self.ranks]}")
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run each request."""
        answers = []
        for request in requests:
            feeds = {}
            for name, rank in self.ranks.items():
                array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                feeds[name] = array if rank else array.reshape(())  # as that backend does
            found = self.session.run(self.outputs, feeds)
            tensors = [pb_utils.Tensor(*pair) for pair in zip(self.outputs, found, strict=True)]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers

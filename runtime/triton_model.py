"""A bundle behind Triton's Python backend; `ditcast deploy` copies this file as `model.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import triton_python_backend_utils as pb_utils

from ditcast.cache.stepping import graphs
from ditcast.errors import ConfigError, DitcastError
from ditcast.runtime import Pipeline
from ditcast.settings import Settings

FROM_ZERO = ("seed", "first")


class TritonPythonModel:
    """One request is one call of `Pipeline.sample`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle beside this file, and load its graphs before Triton says `ready`."""
        given = json.loads(args["model_config"])["parameters"]
        asked = {name: entry["string_value"] for name, entry in given.items()}
        self.loop: Literal["host", "graph"] = "graph" if asked["loop"] == "graph" else "host"
        try:
            # `deploy` has checked who built the engines, and this folder holds code anyway.
            settings = Settings(threads=int(asked["threads"]), trust_engines=True)
            self.pipeline = Pipeline(
                Path(__file__).parent / "bundle", backend=asked["backend"], settings=settings
            )
            steps = ("temporal", *graphs(self.pipeline.plan()))
            for name in ("sampler",) if self.loop == "graph" else steps:
                self.pipeline.session(name)
        except DitcastError as err:
            raise pb_utils.TritonModelException(str(err)) from err

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself: one with bad input harms no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            samples = self._sample(request)
        except DitcastError as err:
            refusal = pb_utils.TritonError(str(err), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)
        return pb_utils.InferenceResponse([pb_utils.Tensor("samples", samples)])

    def _sample(self, request: Any) -> Any:
        given = {}
        for name in ("labels", "seed", "first", "guidance", "steps"):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:  # all but the labels have defaults
                given[name] = tensor.as_numpy().tolist()
        labels = given.pop("labels")
        options = {name: value for name, (value,) in given.items()}
        largest = self.pipeline.recipe.batch
        if len(labels) > largest:  # one client should not take all memory
            raise ConfigError(
                f"labels: got {len(labels)}, expected at most {largest}; send several requests, "
                f"the second with first {largest}"
            )
        for name in FROM_ZERO:
            if options.get(name, 0) < 0:
                raise ConfigError(f"{name}: got {options[name]}, expected a number from 0")
        return self.pipeline.sample(labels, loop=self.loop, **options)

"""What TensorRT says that it built: the layers of an engine, from the log of its builder.

The inspector of an engine needs a GPU; the builder's log does not. With detailed verbosity it
lists every layer with its kind, the types of what it reads and writes, and the ONNX nodes that
went into it. The text is public, but not an interface: a line that is not understood is an error.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ditcast.errors import UnsupportedError

LAYERS = "Layers:"
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: "
)
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class EngineLayer(NamedTuple):
    """One layer: the types of its inputs, constants and outputs, and the ONNX nodes inside."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, values: list[Any]) -> EngineLayer:
        """From JSON."""
        name, kind, *lists = values
        return cls(name, kind, *(tuple(part) for part in lists))


def parse_layers(message: str) -> list[EngineLayer]:
    """The layers in the message that begins with `Layers:`.

    Raises:
        UnsupportedError: it reads otherwise than that of the versions that are known.
    """
    found = []
    listed = message.partition("\n\n")[0].splitlines()
    for line in listed:
        if not line.startswith("Name: "):
            continue
        match = _LINE.match(line)
        if match is None:
            raise UnsupportedError(
                f"audit: the builder's log has a layer that is not understood ({line[:80]!r}); "
                "expected that of tensorrt-rtx 1.7 or tensorrt 11; install one of them"
            )
        lists = [_TYPE.findall(match[key]) for key in ("inputs", "constants", "outputs")]
        values = [match["name"], match["kind"], *lists, _NODE.findall(line)]
        found.append(EngineLayer.of(values))
    return found


def weights_bytes(messages: list[str]) -> int:
    """The bytes of an engine's weights, by the same log; 0 where it does not say."""
    found = [match for match in map(WEIGHTS.search, messages) if match is not None]
    return int(found[-1][1]) if found else 0

"""What TensorRT says that it built: the layers of an engine, from the log of its builder.

The inspector of an engine needs a GPU; the builder's log, which has the same text, does not. With
detailed verbosity it lists every layer with its kind, the types of what it reads and writes, and
the ONNX nodes that went into it. The text is public, but not an interface: a line that is not
understood is an error.
"""

from __future__ import annotations

import re
from typing import NamedTuple

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


def parse_layers(message: str) -> list[EngineLayer]:
    """The layers in the message that begins with `Layers:`.

    Raises:
        UnsupportedError: there is none, or it reads otherwise than that of known versions.
    """
    if not message.startswith(LAYERS):
        raise UnsupportedError(
            "audit: the builder listed no layers; build again on a machine with a GPU, or with "
            "--backend tensorrt-rtx"
        )
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
        found.append(
            EngineLayer(
                name=match["name"],
                kind=match["kind"],
                inputs=tuple(_TYPE.findall(match["inputs"])),
                constants=tuple(_TYPE.findall(match["constants"])),
                outputs=tuple(_TYPE.findall(match["outputs"])),
                nodes=tuple(_NODE.findall(line)),
            )
        )
    return found


def weights_bytes(messages: list[str]) -> int:
    """The bytes of an engine's weights, by the same log; 0 where it does not say."""
    found = [match for match in map(WEIGHTS.search, messages) if match is not None]
    return int(found[-1][1]) if found else 0

"""Slots of a partial step as branches: what is not wanted is not computed."""

from __future__ import annotations

from collections import defaultdict

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

KEPT = "kept."  # start of the outputs that a choice gives


def branch(model: ModelProto) -> ModelProto:
    """The model with every `Where(condition, y, cache)` that gives a `kept.*` output as an `If`.

    The nodes that only make y move into its branch, and so do their weights: captured from
    outside, ONNX Runtime would leave them out of its rewrite for CPUs whose u8 x s8 products
    saturate.
    """
    nodes, weights = list(model.graph.node), list(model.graph.initializer)
    outputs = {output.name: output for output in model.graph.output}
    for output in filter(lambda o: o.name.startswith(KEPT), outputs.values()):
        (choice,) = (node for node in nodes if output.name in node.output)
        moved = _region(nodes, choice.input[1], set(outputs))
        inside = {node.name for node in moved}
        rest = [node for node in nodes if node.name not in inside]
        read = {name for node in rest for name in node.input}
        held = [w for w in weights if any(w.name in node.input for node in moved)]
        branching = _if(choice, output, moved, held)
        nodes = [branching if node.name == choice.name else node for node in rest]
        weights = [w for w in weights if w not in held or w.name in read]
    found = ModelProto()
    found.CopyFrom(model)
    del found.graph.node[:]
    del found.graph.initializer[:]
    found.graph.node.extend(nodes)
    found.graph.initializer.extend(weights)
    return found


def _region(nodes: list[NodeProto], tensor: str, outputs: set[str]) -> list[NodeProto]:
    """The nodes that nothing but this tensor, which has one reader, depends on; in order."""
    readers = defaultdict(set)
    for node in nodes:
        for name in node.input:
            readers[name].add(node.name)
    makers = {name: node for node in nodes for name in node.output}
    inside = {makers[tensor].name}
    todo = [makers[tensor]]
    while todo:
        for name in todo.pop().input:
            maker = makers.get(name)
            if maker is None or maker.name in inside:
                continue
            given = {reader for output in maker.output for reader in readers[output]}
            if given <= inside and not outputs.intersection(maker.output):
                inside.add(maker.name)
                todo.append(maker)
    return [node for node in nodes if node.name in inside]


def _if(
    choice: NodeProto, output: ValueInfoProto, moved: list[NodeProto], held: list[TensorProto]
) -> NodeProto:
    """The `If` in the place of a `Where`."""
    condition, computed, cached = choice.input
    copy = f"{output.name}/cached"
    keep = helper.make_node("Identity", [cached], [copy], name=f"{copy}/Identity")
    bodies = []
    for nodes, name, weights in ((moved, computed, held), ([keep], copy, [])):
        info = ValueInfoProto()
        info.CopyFrom(output)
        info.name = name
        bodies.append(helper.make_graph(nodes, f"{output.name}/{name}", [], [info], weights))
    return helper.make_node(
        "If",
        [condition],
        [output.name],
        name=f"{output.name}/If",
        then_branch=bodies[0],
        else_branch=bodies[1],
    )

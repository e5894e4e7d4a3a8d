"""`ditcast deploy --to triton`: the repository, its `model.py` behind a stand-in for Triton."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.manifest import Engine, hash_file
from ditcast.runtime import Pipeline, triton
from ditcast.runtime.backends import graph_file
from ditcast.runtime.trust import sign
from ditcast.sampling import draw_noise
from tests.conftest import Cli

TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
PARTS = ("temporal", "full", "reuse", "sampler")
Arrays = dict[str, NDArray[Any]]


class TritonError(str):
    """What a refused request is answered with."""

    INVALID_ARG = 3

    def __new__(cls, message: str, code: int) -> TritonError:
        assert code == cls.INVALID_ARG
        return super().__new__(cls, message)


class Tensor(SimpleNamespace):
    """A named array."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        super().__init__(name=name, as_numpy=lambda: array)


def response(tensors: list[Tensor] | None = None, error: str | None = None) -> Any:
    """What the model answers a request with."""
    return SimpleNamespace(tensors=tensors, error=error)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that Triton gives to its Python models, as far as ours uses it."""
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.TritonError, utils.InferenceResponse = Tensor, TritonError, response
    utils.TritonModelException = RuntimeError
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)


@pytest.fixture
def config() -> Callable[[Path], Any]:
    """Read a `config.pbtxt` by Triton's own schema, which knows every field there is."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return lambda model: text_format.Parse(
        (model / "config.pbtxt").read_text(), schema.ModelConfig()
    )


def load(model: Path, **changed: str) -> Any:
    """A Python model as Triton loads it."""
    spec = importlib.util.spec_from_file_location("served", model / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {"backend": "onnxruntime", "loop": "host", "threads": "1"} | changed
    parameters = {key: {"string_value": value} for key, value in given.items()}
    served = module.TritonPythonModel()
    served.initialize({"model_config": json.dumps({"parameters": parameters})})
    return served


def ask(served: Any, *requests: dict[str, Any]) -> list[Any]:
    """The samples of each request, or the text of its refusal."""
    kinds = {"guidance": np.float32, "steps": np.int32}
    found = served.execute(
        [
            {
                name: Tensor(name, np.array(value, kinds.get(name, np.int64)).reshape(-1))
                for name, value in request.items()
            }
            for request in requests
        ]
    )
    return [x.error if x.tensors is None else x.tensors[0].as_numpy() for x in found]


@pytest.fixture(scope="module")
def repository(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of the tiny bundle; never write to it."""
    place = tmp_path_factory.mktemp("triton") / "models"
    assert triton.deploy(shared_bundle, place) == ("tiny_host", "tiny_graph")
    return place


def test_what_is_written(repository: Path, shared_bundle: Bundle) -> None:
    """No more than is needed, readable for every user, and a whole bundle for the host loop."""
    held = {path.relative_to(repository).as_posix() for path in repository.rglob("*.*")}
    served = {name for name in held if not name.startswith("tiny_host/1/bundle/")}
    assert served == {
        *("README.md", "tiny_host/config.pbtxt", "tiny_host/1/model.py"),
        *("tiny_graph/config.pbtxt", "tiny_graph/1/model.onnx", "tiny_graph/1/weights.data"),
    }
    assert repository.stat().st_mode & 0o777 == 0o755
    small = Bundle.open(repository / "tiny_host/1/bundle")
    small.verify()
    assert {graph.target for graph in small.manifest.graphs} == {"onnxruntime"}
    assert small.manifest.fingerprint() == shared_bundle.manifest.fingerprint()


def test_configurations(repository: Path, config: Callable[[Path], Any]) -> None:
    """Both are of Triton's schema; that of the graph says what ONNX Runtime says of its model."""
    host, graph = config(repository / "tiny_host"), config(repository / "tiny_graph")
    assert (host.name, host.backend, host.max_batch_size) == ("tiny_host", "python", 0)
    assert [port.name for port in host.input if not port.optional] == ["labels"]
    assert [*host.output[0].dims] == [-1, 3, 16, 16]
    assert (graph.name, graph.backend, graph.max_batch_size) == ("tiny_graph", "onnxruntime", 0)
    session = onnxruntime.InferenceSession(repository / "tiny_graph/1/model.onnx")
    for ports, wanted in (
        (graph.input, session.get_inputs()),
        (graph.output, session.get_outputs()),
    ):
        assert [port.name for port in ports] == [x.name for x in wanted]
        for port, array in zip(ports, wanted, strict=True):
            kind = port.DESCRIPTOR.fields_by_name["data_type"].enum_type
            assert kind.values_by_number[port.data_type].name == TYPES[array.type]
            dims = [dim if isinstance(dim, int) else -1 for dim in array.shape]
            assert [*port.dims] == (dims or [1])  # Triton knows no scalars


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("loop", ["host", "graph"])
def test_the_images_of_the_pipeline(repository: Path, shared_bundle: Bundle, loop: Any) -> None:
    """Every input is an argument of `Pipeline.sample`."""
    pipeline = Pipeline(shared_bundle)
    requests: list[dict[str, Any]] = [
        {"labels": [3, 1], "seed": 2},
        {"labels": [1], "seed": 2, "first": 1},
        {"labels": [4], "guidance": 1.0},
        {"labels": [0], "steps": 6},
    ]
    found = ask(load(repository / "tiny_host", loop=loop), *requests)
    for request, samples in zip(requests, found, strict=True):
        np.testing.assert_array_equal(samples, pipeline.sample(**request, loop=loop))
    np.testing.assert_array_equal(found[1][0], found[0][1])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("request_", "refusal"),
    [
        ({"labels": [5]}, "labels: got 5, expected 0 to 4"),
        ({"labels": []}, "labels: got none"),
        ({"labels": [1, 2, 3]}, "labels: got 3, expected at most 2; send several requests"),
        ({"labels": [1], "seed": -1}, "seed: got -1, expected a number from 0"),
        ({"labels": [1], "first": -1}, "first: got -1, expected a number from 0"),
        ({"labels": [1], "guidance": float("nan")}, "guidance: got nan"),
        ({"labels": [1], "steps": 0}, "steps: got 0"),
    ],
)
def test_a_request_that_cannot_be(repository: Path, request_: dict[str, Any], refusal: str) -> None:
    """Its error is its answer; the other request in the same call has its images."""
    bad, good = ask(load(repository / "tiny_host"), request_, {"labels": [1]})
    assert str(bad).startswith(refusal)
    assert good.shape == (1, 3, 16, 16)


@pytest.mark.usefixtures("backend")
def test_a_model_that_cannot_be_loaded(repository: Path, tmp_path: Path) -> None:
    """In Triton's own exception, which it shows beside the model."""
    shutil.copytree(repository / "tiny_host", tmp_path / "m")
    with (tmp_path / "m/1/bundle/graphs/onnxruntime/weights.data").open("ab") as file:
        file.write(b"!")
    with pytest.raises(RuntimeError, match="weights.data in .*, expected .* bytes"):
        load(tmp_path / "m")


def test_the_graph_loop_of_a_stochastic_sampler(
    other_bundle: Bundle, tmp_path: Path, config: Callable[[Path], Any]
) -> None:
    """With step noise as an input; its images are those of the pipeline."""
    triton.deploy(other_bundle, tmp_path / "models")
    model = tmp_path / "models/other_graph"
    ports = {port.name: [*port.dims] for port in config(model).input}
    assert ports["step_noise"] == [6, -1, 4, 8, 8]
    noise = draw_noise(1, 0, (4, 8, 8), 6)[:, None]
    feeds: Arrays = {
        "noise": noise[0],
        "step_noise": noise[1:],
        "class_labels": np.array([2]),
        "guidance_scale": np.array(1.5, np.float32),
    }
    pipeline = Pipeline(other_bundle)
    found = pipeline.backend.session(graph_file(other_bundle, "onnxruntime", "sampler")).run(
        feeds, ["latents"]
    )["latents"]
    assert hash_file(model / "1/model.onnx") == hash_file(
        other_bundle.graph("onnxruntime", "sampler")
    )
    np.testing.assert_array_equal(found, pipeline.sample([2], seed=1, loop="graph"))


def test_float_inputs_of_4_bit_weights(
    bundle: Bundle, tmp_path: Path, cli: Cli, config: Callable[[Path], Any]
) -> None:
    """Triton's onnxruntime backend would round them; the graph loop is served by Python then."""
    held = bundle.manifest.quantization
    assert held is not None
    layers = [layer.model_copy(update={"precision": "w4a16"}) for layer in held.layers]
    bundle.commit({"quantization": held.model_copy(update={"layers": tuple(layers)})})
    done = cli("deploy", bundle.path, "--to", "triton", tmp_path / "models")
    assert done.code == 0
    assert "cannot set the session option" in done.out + done.err
    found = config(tmp_path / "models/tiny_graph")
    assert found.backend == "python"
    assert found.parameters["loop"].string_value == "graph"
    assert "cannot set the session option" in (tmp_path / "models/README.md").read_text()


@pytest.fixture
def engines(typed_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with plans for TensorRT, signed by this user, that no GPU would load."""
    monkeypatch.setenv("DITCAST_KEY", str(tmp_path / "keys" / "engine.key"))
    shutil.copytree(typed_bundle.path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    found = []
    for name in PARTS:
        identity = graph_file(bundle, "tensorrt", name).identity
        engine = Engine(
            graph=name,
            backend="tensorrt",
            version="11.4.0",
            device="sm90",
            flags=(),
            profile={},
            made_from=hashlib.sha256(identity.encode()).hexdigest(),
            key=name,
            path=f"engines/{name}.plan",
            layers=f"engines/{name}.layers.txt",
            weights_bytes=0,
            build_s=0.0,
        )
        bundle.staged(engine.path).write_bytes(name.encode())
        bundle.staged(engine.layers).write_text("")
        signature = sign(engine, hash_file(bundle.staged(engine.path)))
        found.append(engine.model_copy(update={"signature": signature}))
    bundle.commit({"engines": tuple(found)})
    return bundle


def test_engines(engines: Bundle, tmp_path: Path, config: Callable[[Path], Any]) -> None:
    """Both loops by the Python backend, each with its own plans, in the version that built them."""
    assert triton.deploy(engines, tmp_path / "m", backend="tensorrt") == ("b_host", "b_graph")
    for loop, graphs in (("host", PARTS[:3]), ("graph", PARTS[3:])):
        found = config(tmp_path / f"m/b_{loop}")
        values = {key: entry.string_value for key, entry in found.parameters.items()}
        assert values == {"backend": "tensorrt", "loop": loop, "threads": "0"}
        small = Bundle.open(tmp_path / f"m/b_{loop}/1/bundle")
        small.verify()
        assert tuple(engine.graph for engine in small.manifest.engines) == graphs
    text = (tmp_path / "m/README.md").read_text()
    assert "'tensorrt-cu13==11.4.0'" in text
    assert "--gpus all" in text


def test_engines_of_somebody_else(
    engines: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are deployed only where the user says so: the server runs them without asking."""
    monkeypatch.setenv("DITCAST_KEY", str(tmp_path / "keys" / "another.key"))
    command = ("deploy", engines.path, "--to", "triton", tmp_path / "m", "--backend", "tensorrt")
    done = cli(*command)
    assert done.code == 2
    assert "is not signed by this user's key" in done.err
    assert not (tmp_path / "m").exists()
    assert cli(*command, "--trust-engines").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "triton: none given, and this check needs a real one; name the Python of"),
        (("--triton", "nowhere/python"), "nowhere/python is no Python that runs"),
        (("--triton", sys.executable), f"{sys.executable} lacks pytriton; how to make"),
    ],
)
def test_the_check_without_triton(
    shared_bundle: Bundle,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, before any work."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    monkeypatch.setattr(sys, "argv", ["triton_check", str(shared_bundle.path), *arguments])
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module("triton_check").main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

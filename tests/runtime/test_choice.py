"""`--backend auto`: measured once, remembered, and never a backend that computes wrong values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError, UnsupportedError
from ditcast.runtime import choice
from ditcast.runtime.choice import check_backend, open_backend, targets_of
from ditcast.settings import Settings
from tests.conftest import Cli


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Choices that no other test made."""
    monkeypatch.setenv("DITCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_measures_once_and_remembers(
    narrow_bundle: Bundle, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_backend("auto", narrow_bundle)
    said = capsys.readouterr().err
    assert f"ditcast: backend auto: {first.name} (" in said
    assert "onnxruntime" in said
    assert "ms a step" in said
    again = open_backend("auto", narrow_bundle)
    assert again.name == first.name
    assert "remembered in" in capsys.readouterr().err
    assert len(list(own_folder.rglob("choices/*.json"))) == 1


def test_what_is_remembered_decides(narrow_bundle: Bundle, own_folder: Path) -> None:
    open_backend("auto", narrow_bundle)
    (place,) = own_folder.rglob("choices/*.json")
    for name in ("openvino", "onnxruntime"):
        place.write_text(json.dumps({"name": name, "why": "a test says so"}))
        assert open_backend("auto", narrow_bundle).name == name


@pytest.mark.parametrize("text", ["", "[]", '{"name": "gone", "why": ""}'])
def test_a_choice_that_cannot_be_read_is_made_again(
    narrow_bundle: Bundle, own_folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    open_backend("auto", narrow_bundle)
    (place,) = own_folder.rglob("choices/*.json")
    place.write_text(text)
    open_backend("auto", narrow_bundle)
    assert "is not readable any more; measuring again" in capsys.readouterr().err
    assert json.loads(place.read_text())["name"] in ("onnxruntime", "openvino")


def test_other_settings_are_another_choice(narrow_bundle: Bundle, own_folder: Path) -> None:
    open_backend("auto", narrow_bundle, Settings(threads=1))
    open_backend("auto", narrow_bundle, Settings(threads=1, spin=False))
    assert len(list(own_folder.rglob("choices/*.json"))) == 2


def test_a_bundle_without_its_target_leaves_a_backend_out(
    shared_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says why: the bundle has graphs for ONNX Runtime only."""
    assert open_backend("auto", shared_bundle).name == "onnxruntime"
    assert "has no graph 'full' for target 'openvino'" in capsys.readouterr().err


def test_wrong_values_disqualify(
    narrow_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "golden_step", lambda bundle, backend: lambda: 12.5)
    with pytest.raises(UnsupportedError, match="onnxruntime misses the golden step \\(12.5 dB\\)"):
        open_backend("auto", narrow_bundle)


def test_a_bad_number_of_threads_is_no_reason_to_choose_another(narrow_bundle: Bundle) -> None:
    for act in (open_backend, lambda name, _, settings: check_backend(name, settings)):
        with pytest.raises(ConfigError, match="threads: got 999, expected 1 to"):
            act("auto", narrow_bundle, Settings(threads=999))


def test_a_policy_that_a_backend_runs_badly() -> None:
    """Before the long work, with the backend that runs it well."""
    check_backend("onnxruntime", Settings(), "learned")
    with pytest.raises(ConfigError, match="cache: got learned, whose branches backend openvino do"):
        check_backend("openvino", Settings(), "learned")


def test_targets_of_a_backend() -> None:
    assert targets_of("onnxruntime") == ("onnxruntime",)
    assert targets_of("openvino") == ("onnxruntime", "openvino")
    assert targets_of("auto") == ("onnxruntime", "openvino")


def test_samples_by_auto(cli: Cli, narrow_bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "out.npy"
    found = cli("sample", narrow_bundle.path, "-o", target, "--labels", 1, "--backend", "auto")
    assert found.code == 0
    assert "ditcast: backend auto: " in found.err
    assert target.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sample", "-o", "out.npy", "--labels", 1, "--backend", "openvino"),
            "no graph 'temporal' for target 'openvino'; it has targets onnxruntime, reference",
        ),
        (
            ("export", "--target", "gpu"),
            "target: unknown 'gpu'; expected one of reference, onnxruntime, openvino",
        ),
        (
            ("audit", "--backend", "gpu"),
            "one of onnxruntime, openvino, tensorrt, tensorrt-rtx, auto",
        ),
    ],
)
def test_mistakes_are_one_line(
    cli: Cli, bundle: Bundle, arguments: tuple[object, ...], message: str
) -> None:
    command, *rest = arguments
    found = cli(command, bundle.path, *rest)
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1

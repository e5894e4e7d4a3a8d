"""Compiled graphs that outlive a process: found again, or dropped with a reason, never trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditcast.runtime.backends.loadcache import LoadCache, folder

FACTS = {"cpu": "some cpu", "onnxruntime": "1.2.3"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test fills."""
    monkeypatch.setenv("DITCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(place: Path) -> None:
    (place / "graph").write_text("compiled")


def entry(cache: LoadCache) -> Path:
    found = cache.find("identity", "graph")
    assert found is not None
    return found


def test_what_was_stored_is_found_in_another_process() -> None:
    LoadCache("runtime", FACTS).store("identity", "graph", fill)
    assert (entry(LoadCache("runtime", FACTS)) / "graph").read_text() == "compiled"


def test_other_graphs_and_runtimes_have_other_entries() -> None:
    LoadCache("runtime", FACTS).store("identity", "graph", fill)
    assert LoadCache("runtime", FACTS).find("another", "graph") is None
    assert LoadCache("other", FACTS).find("identity", "graph") is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (FACTS | {"cpu": "new cpu"}, "is for cpu 'some cpu', expected 'new cpu'"),
        (FACTS | {"onnxruntime": "9"}, "is for onnxruntime '1.2.3', expected '9'"),
    ],
)
def test_an_entry_of_another_machine_or_version_is_said_and_dropped(
    facts: dict[str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    LoadCache("runtime", FACTS).store("identity", "full.onnx", fill)
    assert LoadCache("runtime", facts).find("identity", "full.onnx") is None
    said = capsys.readouterr().err
    assert said.startswith("ditcast: full.onnx: the compiled graph in ")
    assert f"{reason}; compiling it again" in said
    assert LoadCache("runtime", FACTS).find("identity", "full.onnx") is None


@pytest.mark.parametrize("damage", ["shorter", "missing", "facts"])
def test_a_damaged_entry_is_said_and_dropped(
    damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = LoadCache("runtime", FACTS)
    cache.store("identity", "graph", fill)
    place = entry(cache)
    if damage == "shorter":
        (place / "graph").write_text("comp")
    elif damage == "missing":
        (place / "graph").unlink()
    else:
        (place / "facts.json").write_text(json.dumps(["no facts"]))
    assert cache.find("identity", "graph") is None
    assert "is damaged; compiling it again" in capsys.readouterr().err
    assert not place.exists()


def test_an_entry_is_there_as_a_whole_or_not_at_all(own_folder: Path) -> None:
    def half(place: Path) -> None:
        fill(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LoadCache("runtime", FACTS).store("identity", "graph", half)
    assert list((own_folder / "runtime").iterdir()) == []


def test_a_disk_that_takes_nothing_is_said(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_folder.write_text("a file where the folder should be")
    LoadCache("runtime", FACTS).store("identity", "full.onnx", fill)
    assert "full.onnx: the compiled graph was not kept in " in capsys.readouterr().err


def test_where_entries_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder() == tmp_path / "cache"
    monkeypatch.delenv("DITCAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "ditcast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "ditcast"

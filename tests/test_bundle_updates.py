"""An update of a bundle happens whole or not at all, wherever a run is killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditcast.bundle import Bundle
from ditcast.errors import BundleError
from tests import bundles
from tests.bundles import FILES, SCALES

NEW = {
    "graphs/reference/full.onnx": b"new graph",
    "graphs/reference/more.onnx": b"one more",
    "graphs/other/full.onnx": b"another target",
}


class Killed(BaseException):
    """The process ends here; no handler of the program sees it."""


class Reaper:
    """Lets `survive` changes of the file system happen, and kills at the next one."""

    def __init__(self, patch: pytest.MonkeyPatch, survive: int) -> None:
        """Watch moves and removals."""
        self.left = survive
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(Path, name, self.counted(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", self.counted(shutil.rmtree))

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, until the count is up."""

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return call(*arguments, **options)

        return wrapper


def contents(path: Path) -> dict[str, bytes]:
    """All files that the bundle lists, after checking that it is whole."""
    bundle = Bundle.open(path)
    bundle.verify()
    return {name: bundle.file(name).read_bytes() for name in bundle.manifest.files}


def update(path: Path) -> None:
    """Replace one graph, remove another file, and add two."""
    bundle = Bundle.open(path)
    bundles.stage(bundle, NEW)
    bundle.commit({"graphs": ()}, replaces="graphs/")


OLD_CONTENTS = FILES
NEW_CONTENTS = {SCALES: FILES[SCALES]} | NEW


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle made by hand."""
    return bundles.make(tmp_path / "small.bundle").path


def test_an_update_killed_anywhere(small: Path, tmp_path: Path) -> None:
    """Killed at every move in turn: up to the journal the old bundle, from there on the new one.

    After it, the same update can be made, and gives the new bundle.
    """
    states = []
    for survive in range(99):
        path = tmp_path / f"killed-{survive}"
        shutil.copytree(small, path)
        bundle = Bundle.open(path)
        bundles.stage(bundle, NEW)
        with pytest.MonkeyPatch.context() as patch:
            Reaper(patch, survive)
            try:
                bundle.commit({"graphs": ()}, replaces="graphs/")
            except Killed:
                finished = False
            else:
                finished = True
        states.append(contents(path))
        update(path)
        assert contents(path) == NEW_CONTENTS
        if finished:
            break
    assert states[0] == OLD_CONTENTS
    assert len(states) > len(NEW) + 2  # the journal, each file, and the manifest at least
    assert all(state == NEW_CONTENTS for state in states[1:])


def test_an_opening_killed_anywhere(small: Path, tmp_path: Path) -> None:
    """Rolling an update forward can itself be killed and taken up."""
    bundle = Bundle.open(small)
    bundles.stage(bundle, NEW)
    with pytest.MonkeyPatch.context() as patch:
        Reaper(patch, 1)
        with pytest.raises(Killed):
            bundle.commit({"graphs": ()}, replaces="graphs/")
    for survive in range(99):
        path = tmp_path / f"killed-{survive}"
        shutil.copytree(small, path)
        with pytest.MonkeyPatch.context() as patch:
            Reaper(patch, survive)
            try:
                Bundle.open(path)
            except Killed:
                finished = False
            else:
                finished = True
        assert contents(path) == NEW_CONTENTS
        if finished:
            break
    assert survive > len(NEW)


def test_what_was_staged_and_never_committed_is_forgotten(small: Path) -> None:
    """A killed export leaves half a graph; the next update of another part must not take it."""
    bundles.stage(Bundle.open(small), {"graphs/reference/full.onnx": b"hal"})
    assert contents(small) == OLD_CONTENTS
    other = Bundle.open(small)
    other.commit({"golden": ()})
    assert contents(small) == OLD_CONTENTS
    bundles.stage(Bundle.open(small), {"graphs/reference/full.onnx": b"hal"})
    report = Bundle.open(small)
    bundles.stage(report, {"reports/page.html": b"page"})
    report.commit({"reports": ("reports/page.html",)})
    assert contents(small) == OLD_CONTENTS | {"reports/page.html": b"page"}


def test_two_writers_never_meet(small: Path) -> None:
    """While one writes, others read; who opened the bundle before it was changed starts again."""
    first, second = Bundle.open(small), Bundle.open(small)
    bundles.stage(first, {"reports/1.txt": b"1"})
    with pytest.raises(BundleError, match="being written by another process; wait for it and run"):
        bundles.stage(second, {"reports/2.txt": b"2"})
    with pytest.raises(BundleError, match="being written by another process"):
        second.commit({"golden": ()})
    assert contents(small) == OLD_CONTENTS
    first.commit({})
    with pytest.raises(BundleError, match="was changed by another process; run the command again"):
        bundles.stage(second, {"reports/2.txt": b"2"})
    third = Bundle.open(small)
    bundles.stage(third, {"reports/2.txt": b"2"})
    third.commit({})
    assert contents(small) == OLD_CONTENTS | {"reports/1.txt": b"1", "reports/2.txt": b"2"}


def test_a_writer_that_failed_is_in_nobodys_way(small: Path) -> None:
    """An error before the commit, in a process that lives on, does not lock the bundle."""

    def fail() -> None:
        bundles.stage(Bundle.open(small), {"reports/1.txt": b"1"})
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    update(small)
    assert contents(small) == NEW_CONTENTS


def test_a_commit_that_could_not_be_opened_again_is_refused(small: Path) -> None:
    """A section that names a file which is not there; the bundle stays as it was."""
    bundle = Bundle.open(small)
    bundles.stage(bundle, {"reports/1.txt": b"1"})
    with pytest.raises(BundleError, match="'reports/2.txt' is not among its files"):
        bundle.commit({"reports": ("reports/2.txt",)})
    assert contents(small) == OLD_CONTENTS
    assert bundle.manifest.reports == ()
    bundles.stage(bundle, {"reports/1.txt": b"1"})
    bundle.commit({"reports": ("reports/1.txt",)})
    assert contents(small) == OLD_CONTENTS | {"reports/1.txt": b"1"}


def test_the_same_object_can_commit_again(small: Path) -> None:
    """Each commit takes what was staged since the one before."""
    bundle = Bundle.open(small)
    for i in range(3):
        bundles.stage(bundle, {f"reports/{i}.txt": b"%d" % i})
        bundle.commit({})
    added = {f"reports/{i}.txt": b"%d" % i for i in range(3)}
    assert contents(small) == OLD_CONTENTS | added


def test_replacing_touches_only_its_prefix(small: Path) -> None:
    """`replaces` removes what lies under it and was not staged again, and nothing else."""
    bundle = Bundle.open(small)
    bundles.stage(bundle, {"graphs/one.onnx": b"1"})
    bundle.commit({"graphs": ()}, replaces="graphs/")
    assert contents(small) == {SCALES: FILES[SCALES], "graphs/one.onnx": b"1"}
    assert not (small / "graphs/reference/full.onnx").exists()


def test_scratch_outlives_commits_and_is_not_part_of_the_bundle(small: Path) -> None:
    """What a stage needs to resume is neither listed nor in the way of `verify`."""
    bundle = Bundle.open(small)
    (bundle.scratch("calibration") / "states").write_bytes(b"half way")
    bundles.stage(bundle, {"reports/page.html": b"page"})
    bundle.commit({"reports": ("reports/page.html",)})
    assert (Bundle.open(small).scratch("calibration") / "states").read_bytes() == b"half way"
    assert "reports/page.html" in contents(small)
    bundle.clear("calibration")
    assert not (small / ".staging").exists()


def test_the_same_recipe_continues(small: Path) -> None:
    """`create` opens what is there; nothing is lost."""
    assert Bundle.create(small, bundles.manifest()).verify() == len(FILES)


def test_a_start_killed_before_anything_can_be_repeated(tmp_path: Path) -> None:
    """All that such a run leaves is an empty staging folder."""
    with pytest.MonkeyPatch.context() as patch:
        Reaper(patch, 0)
        with pytest.raises(Killed):
            Bundle.create(tmp_path / "b", bundles.manifest())
    with pytest.raises(BundleError, match="no manifest.json in"):
        Bundle.open(tmp_path / "b")
    assert Bundle.create(tmp_path / "b", bundles.manifest()).verify() == 0


@pytest.mark.parametrize(
    ("fingerprint", "recipe", "match"),
    [
        (
            "f" * 64,
            {"steps": 20, "method": "mse"},
            r"steps 50 \(asked for 20\), method 'absmax' \(a",
        ),
        (
            "0" * 64,
            {},
            r"holds another bundle: model somewhere \(asked for somewhere\); give anoth",
        ),
    ],
)
def test_another_bundle_in_the_way_says_what_differs(
    small: Path, fingerprint: str, recipe: dict[str, Any], match: str
) -> None:
    """Recipe keys with both values, or the model; the bundle stays as it is."""
    with pytest.raises(BundleError, match=match):
        Bundle.create(small, bundles.manifest(fingerprint, **recipe))
    assert contents(small) == OLD_CONTENTS


def test_another_schedule_in_the_way_is_named(small: Path) -> None:
    """Same weights and recipe, but another noise schedule."""
    other = bundles.manifest().model_copy(update={"schedule": {"_class_name": "DDPMScheduler"}})
    with pytest.raises(BundleError, match="holds another bundle: another noise schedule"):
        Bundle.create(small, other)


def test_other_things_in_the_way_are_left_alone(tmp_path: Path) -> None:
    """A file, or a folder with files of someone else; an empty or a missing folder is fine."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("mine")
    with pytest.raises(BundleError, match="is a file; give a directory to -o"):
        Bundle.create(tmp_path / "file", bundles.manifest())
    with pytest.raises(BundleError, match="holds other files; give an empty directory to -o"):
        Bundle.create(tmp_path / "folder", bundles.manifest())
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["note"]
    (tmp_path / "empty").mkdir()
    Bundle.create(tmp_path / "empty", bundles.manifest())
    Bundle.create(tmp_path / "not" / "yet", bundles.manifest())

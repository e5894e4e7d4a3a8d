"""The gate: each planted fault fails with its own line, and what is good passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.manifest import FileEntry, hash_file
from ditcast.models import LoadedModel
from ditcast.runtime import bench
from tests import bundles, reports
from tests.conftest import Cli, make_bundle
from tests.reports import (
    NAMES,
    audited,
    blurred,
    keep,
    make_report,
    pictures,
    spread,
    with_distances,
    with_samples,
)

BEST = "w8a8 + cache"
UNLIKE = ("no blurred pictures", "no noisy pictures")  # others have other amounts of detail
Report = dict[str, Any]


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    """A handmade bundle with good figures and a good audit."""
    return reports.good(tmp_path / "good.bundle")


def failures(out: str) -> list[str]:
    """The names of the checks that failed."""
    return [line.removeprefix("FAIL ").split(":")[0] for line in out.splitlines()]


def test_good_figures_pass(cli: Cli, made: Bundle) -> None:
    done = cli(
        *("gate", made.path, "--min-psnr", 26, "--min-ssim", 0.8, "--min-speedup", 2),
        *("--against", made.path),
    )
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{made.path}: 16 checks passed\n"
    Bundle.open(made.path).verify()


def test_figures_are_read_once(cli: Cli, made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashed and parsed: they may be large, and must not change in between."""
    reads: list[str] = []

    def counted(path: Path) -> FileEntry:
        reads.append(path.name)
        return hash_file(path)

    monkeypatch.setattr("ditcast.bundle.hash_file", counted)
    assert cli("gate", made.path).code == 0
    assert reads.count("bench.json") == 1
    assert reads.count("audit.json") == 1


def slower(report: Report) -> None:
    report["variants"][3]["speedup"] = spread(0.97)


def idle(report: Report) -> None:
    report["variants"][3] |= {"full_steps": 6, "reuse_step_ms": None}


def eager(report: Report) -> None:
    reason = "cache stack reused every step that it may: its threshold is 1e+09"
    report["variants"][3] |= {"cache": "stack", "full_steps": 2, "idle": reason}


def black(report: Report) -> None:
    with_samples(report, BEST, np.full_like(pictures(), -1), pictures())


def noise(report: Report) -> None:
    random = np.random.default_rng(1).uniform(-1, 1, pictures().shape).astype(np.float32)
    with_samples(report, BEST, random, pictures())


def blur(report: Report) -> None:
    with_samples(report, BEST, blurred(pictures()), pictures())


def others(report: Report) -> None:
    with_samples(report, BEST, np.roll(pictures(), 1, axis=0), pictures())


@pytest.mark.parametrize(
    ("plant", "fault", "expected", "line"),
    [
        (slower, "slower", ["not slower"], f"{BEST} runs at 0.97 times the speed"),
        (idle, "idle-cache", [f"cache of {BEST}"], "6 of 6 steps were full, so cache fora never"),
        (
            eager,
            "idle-cache",
            [f"cache of {BEST}"],
            "2 of 6 steps were full; cache stack reused ev",
        ),
        (black, "pictures", ["no flat pictures", "pictures of the same"], "8 of 8 pictures"),
        (noise, "pictures", ["no noisy pictures", "pictures of the same"], "are noise"),
        (blur, "pictures", ["no blurred pictures"], "are blurred, with less than half"),
        (others, "pictures", [*UNLIKE, "pictures of the same"], "dB to one another"),
    ],
    ids=["slower", "dead cache", "always reusing", "black", "noise", "blurred", "other pictures"],
)
def test_planted_figures(
    cli: Cli,
    made: Bundle,
    plant: Callable[[Report], None],
    fault: str,
    expected: list[str],
    line: str,
) -> None:
    report = make_report(made, *NAMES)
    plant(report)
    keep(made, report)
    done = cli("gate", made.path)
    assert done.code == 1
    assert failures(done.out) == expected
    assert line in done.out
    assert cli("gate", made.path, "--allow", fault).code == 0


def test_one_bad_seed_of_many_is_no_fault(cli: Cli, made: Bundle) -> None:
    report = make_report(made, *NAMES)
    report["variants"][3]["broken"]["blurred"] = 8  # of 160
    keep(made, report)
    assert cli("gate", made.path).code == 0
    report["variants"][3]["broken"]["blurred"] = 9
    keep(made, report)
    assert failures(cli("gate", made.path).out) == ["no blurred pictures"]


def test_stale_figures(cli: Cli, made: Bundle) -> None:
    """The graphs have changed since; a report, on the other hand, is no change."""
    bundles.stage(made, {"graphs/onnxruntime/full.onnx": b"others" * 20})
    made.commit({})
    done = cli("gate", made.path)
    assert done.code == 1
    assert failures(done.out) == ["stale report", "stale audit"]
    assert f"measure again with: ditcast bench {made.path}" in done.out
    assert f"audit again with: ditcast audit {made.path} --backend onnxruntime" in done.out


def test_a_layer_in_float(cli: Cli, made: Bundle) -> None:
    audit = audited()
    audit["layers"][1] |= {"integer": False, "kernel": "MatMul"}
    audit["golden_db"] = 31.0
    keep(made, make_report(made, *NAMES), audit)
    done = cli("gate", made.path)
    assert done.code == 1
    assert done.out.splitlines() == [
        "FAIL integer kernels: 1 of 2 quantized layers run in integer kernels; not "
        "blocks.0.mlp.fc1 (MatMul)",
        "FAIL golden step: the golden step comes out at 31.0 dB, expected 40.0",
    ]
    assert cli("gate", made.path, "--allow", "float").code == 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--min-psnr", 26.2), f"FAIL PSNR: PSNR of {BEST} (160 samples) is 26.10 dB, expected at"),
        (("--min-ssim", 0.9), "is 0.8760, expected at least 0.9000"),
        (("--min-speedup", 2.3), "is 2.270x, expected at least 2.300x"),
        (
            ("--max-fd-to-fp", 0.4),
            "fd_to_fp of w8a8 + cache (160 samples) is 0.5, expected at most",
        ),
    ],
)
def test_limits(cli: Cli, made: Bundle, flags: tuple[object, ...], line: str) -> None:
    keep(made, with_distances(make_report(made, *NAMES), 0.3))
    done = cli("gate", made.path, *flags)
    assert done.code == 1
    (found,) = done.out.splitlines()
    assert line in found


def test_against_a_baseline(cli: Cli, made: Bundle, tmp_path: Path) -> None:
    """No worse than it by more than what is allowed, under the same conditions."""
    report = make_report(made, *NAMES)
    better = report["variants"][3] | {"psnr_db": spread(27.2), "speedup": spread(2.5)}
    better["size_bytes"] = 900_000
    baseline = report | {"variants": [*report["variants"][:3], better], "shown": None}
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(baseline))
    done = cli("gate", made.path, "--against", path)
    assert done.code == 1
    assert failures(done.out) == [
        f"{name} against the baseline" for name in ("PSNR", "speed-up", "size")
    ]
    assert "is 2.270x, the baseline's is 2.500x: expected at least 2.375x" in done.out
    assert cli("gate", made.path, "--against", path, "--psnr-drop", 2, "--worse", 0.2).code == 0
    for key, value, line in (
        ("request", baseline["request"] | {"steps": 9}, "with steps 6, the baseline with 9"),
        ("bundle", baseline["bundle"] | {"fingerprint": "0" * 64}, "of another model (somewhere)"),
        ("variants", report["variants"][:1], "the baseline neither quantizes nor caches"),
    ):
        path.write_text(json.dumps(baseline | {key: value}))
        done = cli("gate", made.path, "--against", path)
        assert done.code == 2
        assert line in done.err


def test_distances_against_a_baseline(cli: Cli, made: Bundle, tmp_path: Path) -> None:
    """No farther than the baseline's interval reaches; judged only where that has distances."""
    path = tmp_path / "baseline.json"
    ours = with_distances(make_report(made, *NAMES), 0.3)  # 0.5 of what the bundle runs
    keep(made, ours)
    for theirs, code in ((0.25, 0), (0.23, 1), (9.0, 0)):  # 0.45 reaches to 0.51
        baseline = with_distances(make_report(made, *NAMES), theirs) | {"shown": None}
        path.write_text(json.dumps(baseline))
        done = cli("gate", made.path, "--against", path)
        assert done.code == code, done.out
    path.write_text(json.dumps(with_distances(baseline, 0.23)))
    (line,) = cli("gate", made.path, "--against", path).out.splitlines()
    assert line == (
        f"FAIL fd_to_fp against the baseline: fd_to_fp of {BEST} is 0.5, the baseline's is 0.43: "
        "expected at most 0.49, the upper end of its interval"
    )
    other = baseline | {"distances": baseline["distances"] | {"real_sha256": "b" * 64}}
    path.write_text(json.dumps(other))
    done = cli("gate", made.path, "--against", path)
    assert done.code == 2
    assert "the distances stand on real_sha256 aaa" in done.err
    assert "measure both with the same --real" in done.err
    keep(made, make_report(made, *NAMES))
    done = cli("gate", made.path, "--against", path)
    assert done.code == 2
    assert "measure it with: ditcast bench BUNDLE --real DATA.npz (extra distances)" in done.err
    path.write_text(json.dumps(make_report(made, *NAMES) | {"shown": None}))
    assert cli("gate", made.path, "--against", path).code == 0


def test_files_for_ci(cli: Cli, made: Bundle, tmp_path: Path) -> None:
    """JUnit XML, Markdown that is appended, and JSON, of a pass and of a failure."""
    xml, text, values = (tmp_path / name for name in ("gate.xml", "summary.md", "gate.json"))
    files = ("--junit", xml, "--summary", text, "--json", values)
    text.write_text("before\n")
    assert cli("gate", made.path, *files).code == 0
    suite = ElementTree.parse(xml).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("10", "0")
    assert json.loads(values.read_text())["passed"] is True
    assert cli("gate", made.path, *files, "--min-psnr", 50).code == 1
    suite = ElementTree.parse(xml).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("11", "1")
    (failed,) = suite.iter("failure")
    assert "is 26.10 dB, expected at least 50.00 dB" in (failed.get("message") or "")
    markdown = text.read_text()
    assert markdown.startswith("before\n### ditcast gate: good.bundle: ✅ passed")
    assert "❌ 1 of 11 checks failed" in markdown
    assert f"| {BEST} | 3 of 6 |" in markdown
    assert "fd_to_fp" not in markdown
    assert json.loads(values.read_text())["checks"][-1]["passed"] is False
    keep(made, with_distances(make_report(made, *NAMES), 0.3))
    assert cli("gate", made.path, *files).code == 0
    assert f"| {BEST} | 0.5 (0.45 to 0.56) |" in text.read_text()


def test_missing_figures_name_their_command(cli: Cli, tmp_path: Path) -> None:
    bundle = reports.exported(bundles.make(tmp_path / "b"))
    done = cli("gate", bundle.path)
    assert done.code == 2
    assert f"has no reports/bench.json; measure with: ditcast bench {bundle.path}" in done.err
    keep(bundle, make_report(bundle, *NAMES))
    done = cli("gate", bundle.path)
    assert done.code == 2
    assert f"audit with: ditcast audit {bundle.path} --backend onnxruntime" in done.err
    keep(bundle, make_report(bundle, *NAMES), audited() | {"backend": "openvino"})
    done = cli("gate", bundle.path)
    assert done.code == 2
    assert "reports/audit.json is of backend openvino, but onnxruntime was measured" in done.err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--min-psnr", "nan"), "min_psnr: got nan, expected a number from 0"),
        (("--min-speedup", -1), "min_speedup: got -1.0, expected a number from 0"),
        (("--max-fd-to-fp", 1), "has no fd_to_fp of w8a8 + cache; measure it with: ditcast bench"),
        (("--against", "nowhere.json"), "no file nowhere.json; give a bundle, or what ditcast"),
        (("--junit", "no/such/gate.xml"), "junit: no folder no/such; create it first"),
        (("--summary", "no/such/x.md"), "summary: no folder no/such; create it first"),
        (("--allow", "everything"), "'everything' is not one of 'stale'"),
    ],
)
def test_bad_requests(cli: Cli, made: Bundle, flags: tuple[object, ...], line: str) -> None:
    done = cli("gate", made.path, *flags)
    assert (done.code, done.out) == (2, "")
    assert line in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"{}", "no report of this version of ditcast (machine: field required)"),
        (b"[1]", "is no report of this version of ditcast"),
        (b"\xff\x00", "is not JSON"),
        (b'{"variants": NaN', "is not JSON"),
    ],
)
def test_a_baseline_that_is_none(
    cli: Cli, made: Bundle, tmp_path: Path, content: bytes, line: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    done = cli("gate", made.path, "--against", path)
    assert done.code == 2
    assert line in done.err
    assert "write one with: ditcast bench BUNDLE --json FILE" in done.err


def test_random_weights_have_no_fidelity(cli: Cli, made: Bundle) -> None:
    """Their pictures are not looked at, and a limit on them is a mistake."""
    report = make_report(made, *NAMES)
    report["bundle"]["random_weights"] = True
    black(report)
    keep(made, report)
    done = cli("gate", made.path, "--min-speedup", 1)
    assert done.code == 0
    done = cli("gate", made.path, "--min-psnr", 1)
    assert done.code == 2
    assert "min-psnr: the weights are random, so fidelity means nothing" in done.err


def test_nothing_to_judge(cli: Cli, made: Bundle) -> None:
    keep(made, make_report(made, NAMES[0]))
    done = cli("gate", made.path)
    assert done.code == 2
    assert "neither quantizes nor caches" in done.err


def test_a_measured_bundle(cli: Cli, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench and audit keep what the gate needs; float graphs in the place of integers fail it."""
    monkeypatch.setattr(bench, "_peak_memory_mib", lambda *arguments: 123.0)
    allow = ("--allow", "slower", "--allow", "pictures")  # it is tiny and untrained
    assert cli("audit", bundle.path).code == 0
    assert cli("bench", bundle.path, "--images", 4, "--threads", 1).code == 0
    done = cli("gate", bundle.path, *allow)
    assert (done.code, done.out) == (0, f"{bundle.path}: 5 checks passed\n")
    assert "warning: medians over 4 samples; under 128 they can move by 5 dB" in done.err
    opened = Bundle.open(bundle.path)
    for name in ("full.onnx", "weights.data"):
        source, target = (f"graphs/{part}/{name}" for part in ("reference", "onnxruntime"))
        shutil.copy(opened.file(source), opened.staged(target))
    opened.commit({})
    assert cli("audit", bundle.path).code == 1
    done = cli("gate", bundle.path, *allow)
    assert done.code == 1
    assert failures(done.out) == ["stale report", "integer kernels"]
    assert "0 of 8 quantized layers run in integer kernels; not blocks.0.attn.qkv" in done.out


def test_a_dead_cache(
    cli: Cli, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interval of one: the policy is on, and every step is full."""
    monkeypatch.setattr(bench, "_peak_memory_mib", lambda *arguments: 123.0)
    bundle = make_bundle(tiny, tmp_path / "idle.bundle", scheme="none", interval=1)
    assert cli("bench", bundle.path, "--images", 2).code == 0
    done = cli("gate", bundle.path, "--allow", "slower", "--allow", "pictures")
    assert done.code == 1
    (line,) = done.out.splitlines()
    assert line == (
        "FAIL cache of cache: cache: 6 of 6 steps were full, so cache fora never triggers"
    )

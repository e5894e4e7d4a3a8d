"""The verdict that can fail a build: what a bundle has measured against what it is held to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ditcast.bundle import Bundle
from ditcast.errors import BundleError, ConfigError
from ditcast.runtime import kept
from ditcast.runtime.audit import GOLDEN_LIMIT_DB
from ditcast.runtime.fidelity import BASIS
from ditcast.runtime.verdict import Row, count, gains

FAULTS = ("stale", "float", "idle-cache", "slower", "pictures")  # fail without being asked for
SANE_SHARE = 0.05  # of all pictures may be broken: one seed may go astray
BROKEN = {
    "flat": "are flat (black, white or grey), with under 20 % of their pair's contrast",
    "blurred": "are blurred, with less than half of their pair's detail",
    "noisy": "are noise, with more than twice their pair's detail",
}
CONDITIONS = ("images", "steps", "guidance", "seed")  # PSNR under others is another figure

Values = dict[str, Any]


class Check(NamedTuple):
    """One figure, whether it passed, and what it is in one line."""

    name: str
    passed: bool
    line: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is asked of a bundle; None asks nothing. `allow` names faults that may be there.

    Against a baseline, PSNR may fall by `psnr_drop` dB; speed-up and size may get worse by
    `worse` of the baseline's.
    """

    min_psnr: float | None = None
    min_ssim: float | None = None
    max_fd_to_fp: float | None = None
    min_speedup: float | None = None
    allow: tuple[str, ...] = ()
    psnr_drop: float = 1.0
    worse: float = 0.05

    def of_fidelity(self) -> list[str]:
        """The limits that mean nothing where the weights are random."""
        given = {"min-psnr": self.min_psnr, "min-ssim": self.min_ssim}
        given["max-fd-to-fp"] = self.max_fd_to_fp
        return [name for name, limit in given.items() if limit is not None]


def judge(
    bundle: Bundle, found: Values, limits: Limits, baseline: Values | None = None
) -> list[Check]:
    """Every check of the figures that `kept.figures` has found in a bundle; nothing is measured.

    Raises:
        BundleError: a figure is missing; the message names the command that makes it.
        ConfigError: a limit or a baseline that these figures cannot be held to.
    """
    made = gains(found["variants"])
    if not made:
        raise ConfigError(
            f"gate: {bundle.path} neither quantizes nor caches, so there is nothing to judge"
        )
    random = found["bundle"]["random_weights"]
    if random and limits.of_fidelity():
        raise ConfigError(
            f"{limits.of_fidelity()[0]}: the weights are random, so fidelity means nothing; "
            "gate without it"
        )
    best = made[-1]
    checks = {
        "stale": _stale(bundle, found),
        "float": _audited(bundle, found),
        "idle-cache": _idle(found["variants"]),
        "slower": _slower(best),
        "pictures": iter(()) if random else _pictures(best, found),
    }
    result = [
        check for fault, made_ in checks.items() if fault not in limits.allow for check in made_
    ]
    result += _limited(best, limits)
    if baseline is not None:
        result += _against(found, baseline, limits)
    return result


def _stale(bundle: Bundle, found: Values) -> Iterator[Check]:
    """The figures have to be of the graphs that are there, and these those that were exported."""
    bundle.check_content({row["target"] for row in found["variants"]})
    fresh = not kept.is_stale(bundle, found)
    line = f"{kept.FIGURES} was measured on these graphs"
    if not fresh:
        line = (
            f"the graphs have changed since {kept.FIGURES} was measured; "
            f"measure again with: ditcast bench {bundle.path}"
        )
    yield Check("stale report", fresh, line)


def _audited(bundle: Bundle, found: Values) -> Iterator[Check]:
    """Every quantized layer in an integer kernel, by an audit of the backend that was measured."""
    if bundle.manifest.quantization is None:
        return
    backend = found["backend"]["backend"]
    renew = f"ditcast audit {bundle.path} --backend {backend}"
    audit = kept.audit(bundle)
    if audit is None:
        raise BundleError(f"gate: {bundle.path} has no {kept.AUDIT}; audit with: {renew}")
    if audit["backend"] != backend:
        raise BundleError(
            f"gate: {kept.AUDIT} is of backend {audit['backend']}, but {backend} was measured; "
            f"audit with: {renew}"
        )
    if kept.is_stale_audit(bundle, audit):
        line = f"the graphs have changed since {kept.AUDIT} was made; audit again with: {renew}"
        yield Check("stale audit", False, line)
        return
    wanted = [layer for layer in audit["layers"] if layer["wanted"]]
    lost = [layer for layer in wanted if not layer["integer"]]
    line = f"{len(wanted) - len(lost)} of {len(wanted)} quantized layers run in integer kernels"
    if lost:
        kernels = ", ".join(f"{layer['layer']} ({layer['kernel']})" for layer in lost[:3])
        line += f"; not {kernels}" + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    yield Check("integer kernels", not lost, line)
    repeated = audit["golden_db"] >= GOLDEN_LIMIT_DB
    line = f"the golden step comes out at {audit['golden_db']:.1f} dB, expected {GOLDEN_LIMIT_DB}"
    yield Check("golden step", repeated, line)


def _idle(rows: list[Row]) -> Iterator[Check]:
    """A cache has to have reused something while it was measured, and to have chosen what."""
    for row in rows:
        if row["cache"] == "none":
            continue
        reused = row["reuse_step_ms"] is not None and row["full_steps"] < row["steps"]
        line = f"{row['name']}: {row['full_steps']:g} of {row['steps']} steps were full"
        if not reused:
            line += f", so cache {row['cache']} never triggers"
        elif row["idle"] is not None:
            line += f"; {row['idle']}"
        yield Check(f"cache of {row['name']}", reused and row["idle"] is None, line)


def _slower(best: Row) -> Iterator[Check]:
    """What the bundle runs has to be at least as fast as full precision."""
    ratio = _figure(best, "speedup")
    line = f"{best['name']} runs at {ratio:.2f} times the speed of full precision"
    yield Check("not slower", ratio >= 1, line)


def _pictures(best: Row, found: Values) -> Iterator[Check]:
    """No black, blurred or noisy pictures, and pictures of the same things."""
    for kind, meaning in BROKEN.items():
        broken, samples = best["broken"].get(kind, 0), best["samples"]
        line = f"{broken} of {count(samples, 'picture')} of {best['name']} {meaning}"
        yield Check(f"no {kind} pictures", broken <= SANE_SHARE * samples, line)
    unpaired = found["unpaired_psnr_db"]
    if unpaired is not None:
        psnr = _figure(best, "psnr_db")
        line = (
            f"{best['name']} is at {psnr:.1f} dB to its pairs, and full precision's pictures are "
            f"at {unpaired['p50']:.1f} dB to one another"
        )
        yield Check("pictures of the same", psnr > unpaired["p50"], line)


def _limited(best: Row, limits: Limits) -> Iterator[Check]:
    """The limits that were asked for."""
    of = f"of {best['name']} ({count(best['samples'], 'sample')})"
    for name, key, least, form in (
        ("PSNR", "psnr_db", limits.min_psnr, "{:.2f} dB"),
        ("SSIM", "ssim", limits.min_ssim, "{:.4f}"),
        ("speed-up", "speedup", limits.min_speedup, "{:.3f}x"),
    ):
        if least is not None:
            got = _figure(best, key)
            line = f"{name} {of} is {form.format(got)}, expected at least {form.format(least)}"
            yield Check(name, got >= least, line)
    if limits.max_fd_to_fp is not None:
        got, most = _figure(best, "fd_to_fp", "value"), limits.max_fd_to_fp
        line = f"fd_to_fp {of} is {got:.4g}, expected at most {most:.4g}"
        yield Check("fd_to_fp", got <= most, line)


def _against(found: Values, baseline: Values, limits: Limits) -> Iterator[Check]:
    """No worse than a baseline of the same model, measured under the same conditions."""
    ours, others = gains(found["variants"])[-1], gains(baseline["variants"])
    if not others:
        raise ConfigError("against: the baseline neither quantizes nor caches; give another report")
    theirs = others[-1]
    if baseline["bundle"]["fingerprint"] != found["bundle"]["fingerprint"]:
        raise ConfigError(
            f"against: the baseline is of another model ({baseline['bundle']['model']}), expected "
            f"one of {found['bundle']['model']}; give a report of the same model"
        )
    for key in CONDITIONS:
        got, expected = found["request"][key], baseline["request"][key]
        if got != expected:
            raise ConfigError(
                f"against: the bundle was measured with {key} {got}, the baseline with {expected}; "
                "measure both with the same"
            )
    lower = {"psnr_db": (1.0, limits.psnr_drop), "speedup": (1 - limits.worse, 0.0)}
    for name, key, form in (("PSNR", "psnr_db", "{:.2f} dB"), ("speed-up", "speedup", "{:.3f}x")):
        if key == "psnr_db" and found["bundle"]["random_weights"]:
            continue
        got, base = _figure(ours, key), _figure(theirs, key)
        least = base * lower[key][0] - lower[key][1]
        line = (
            f"{name} of {ours['name']} is {form.format(got)}, the baseline's is "
            f"{form.format(base)}: expected at least {form.format(least)}"
        )
        yield Check(f"{name} against the baseline", got >= least, line)
    got, most = ours["size_bytes"], theirs["size_bytes"] * (1 + limits.worse)
    line = (
        f"the graphs of {ours['name']} have {got:,} bytes, the baseline's "
        f"{theirs['size_bytes']:,}: expected at most {most:,.0f}"
    )
    yield Check("size against the baseline", got <= most, line)
    if baseline["distances"] is not None:
        yield _distance_against(found, baseline)


def _distance_against(found: Values, baseline: Values) -> Check:
    """No farther from full precision than the interval of the baseline reaches."""
    ours, theirs = (gains(figures["variants"])[-1] for figures in (found, baseline))
    got = _figure(ours, "fd_to_fp", "value")
    value, most = (_figure(theirs, "fd_to_fp", part) for part in ("value", "high"))
    for key in BASIS:
        if found["distances"][key] != baseline["distances"][key]:
            raise ConfigError(
                f"against: the distances stand on {key} {found['distances'][key]}, those of the "
                f"baseline on {baseline['distances'][key]}; measure both with the same --real"
            )
    line = (
        f"fd_to_fp of {ours['name']} is {got:.4g}, the baseline's is {value:.4g}: expected at most "
        f"{most:.4g}, the upper end of its interval"
    )
    return Check("fd_to_fp against the baseline", got <= most, line)


def _figure(row: Row, key: str, part: str = "p50") -> float:
    """The median of a figure, or another part of it.

    Raises:
        BundleError: it was not measured.
    """
    found = row.get(key)
    if found is not None:
        return float(found[part])
    remedy = {
        "ssim": "install ditcast[report] and measure again with: ditcast bench",
        "fd_to_fp": "measure it with: ditcast bench BUNDLE --real DATA.npz (extra distances)",
    }
    raise BundleError(
        f"gate: {kept.FIGURES} has no {key} of {row['name']}; "
        f"{remedy.get(key, 'measure again with: ditcast bench')}"
    )

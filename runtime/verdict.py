"""What a measurement says in words: the verdict, and what else an honest reader has to know."""

from __future__ import annotations

from typing import Any

ENOUGH_SAMPLES = 128  # medians over fewer images jump
EQUAL_TIME = 1.1  # a rival that takes at most this many times as long has equal time

Row = dict[str, Any]
Spread = dict[str, float] | None


def gains(rows: list[Row]) -> list[Row]:
    """The variants that the bundle is for: neither the reference nor its fewer-steps rival."""
    exact = (rows[0]["target"], "none")
    return [row for row in rows[1:] if (row["target"], row["cache"]) != exact]


def _median(spread: Spread) -> float | None:
    return None if spread is None else spread["p50"]


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def verdict(report: dict[str, Any]) -> str:
    """What the last gain, the combined one, brings and costs, in one sentence."""
    reference = report["variants"][0]
    made = gains(report["variants"])
    measured = f"measured on {_hardware(report)} on {report['machine']['date']}"
    size = reference["size_bytes"] / 2**20
    if not made:
        ms = _median(reference["image_ms"])
        time = "an unknown time" if ms is None else f"{ms:,.1f} ms"
        return (
            f"Full precision takes {time} per image and {size:.1f} MiB of graphs; nothing else "
            f"was there to compare it with ({count(reference['samples'], 'sample')}, {measured})."
        )
    best = made[-1]
    return (
        f"{best['name']} {_speed(best, reference)}, {_fidelity(best, report)}, with "
        f"{best['size_bytes'] / 2**20:.1f} MiB of graphs instead of {size:.1f} MiB, {measured}."
    )


def _speed(row: Row, reference: Row) -> str:
    """Faster or slower than full precision, as a predicate."""
    ratio = _median(row["speedup"])
    if ratio is None:
        return "was not timed"
    own, exact = _median(row["image_ms"]), _median(reference["image_ms"])
    detail = ""
    if own is not None and exact is not None:
        detail = f" ({own:,.1f} instead of {exact:,.1f} ms per image)"
    if ratio < 1:
        return f"is slower than full precision, at {ratio:.2f} times its speed{detail}"
    return f"is {ratio:.2f} times as fast as full precision{detail}"


def _fidelity(row: Row, report: dict[str, Any]) -> str:
    """How close to full precision; never without the number of samples."""
    psnr = _median(row["psnr_db"])
    if psnr is None:
        return f"with unknown fidelity ({count(row['samples'], 'sample')})"
    text = f"at a median PSNR of {psnr:.1f} dB to its images ({count(row['samples'], 'sample')}"
    if report["bundle"]["random_weights"]:
        text += ", of random weights, so this figure means nothing"
    return text + ")"


def _hardware(report: dict[str, Any]) -> str:
    """Processor and threads."""
    cpu = " ".join(report["machine"]["cpu"].split()) or "an unnamed CPU"
    threads = report["backend"].get("threads")
    return cpu if threads is None else f"{cpu} with {count(threads, 'thread')}"


def compared(report: dict[str, Any]) -> str:
    """What was compared with what."""
    request, recipe = report["request"], report["bundle"]["recipe"]
    names = ", ".join(row["name"] for row in report["variants"][1:])
    against = f" was compared with {names}" if names else " was measured"
    return (
        f"Full precision (float32, {request['steps']} {recipe['sampler']} steps, guidance "
        f"{request['guidance']}, backend {report['backend']['backend']}){against}: the same "
        f"{request['images']} seeds and classes, batches of {request['batch']}, the same threads, "
        "all variants in turn in one process."
    )


def notes(report: dict[str, Any]) -> list[str]:
    """What an honest reader has to know besides the verdict."""
    rows, random = report["variants"], report["bundle"]["random_weights"]
    found = []
    if random:
        found.append(
            "The weights are random: fidelity means nothing here. Only times, sizes and memory do."
        )
    for row in gains(rows):
        if (_median(row["speedup"]) or 1) < 1:
            text = f"{row['name']} {_speed(row, rows[0])}, {_fidelity(row, report)}."
            found.append(text + " It saves no time here.")
    if not random:
        found += _single_notes(rows, report) + _rival_note(rows, report)
    if rows[0]["samples"] < ENOUGH_SAMPLES:
        found.append(
            f"The medians are over {count(rows[0]['samples'], 'sample')}; over fewer than "
            f"{ENOUGH_SAMPLES} they can move by 5 dB from one set of seeds to another."
        )
    if report["pictures"] is None:
        found.append(
            "The samples are latents and the bundle has no decoder: there are no pictures, and "
            "PSNR and SSIM are of latents, scaled by the range of full precision's."
        )
    return found


def _single_notes(rows: list[Row], report: dict[str, Any]) -> list[str]:
    """Where one gain alone is both faster and closer than all of them together."""
    *singles, best = gains(rows) or [rows[0]]
    found = []
    for row in singles:
        better = [
            single is not None and combined is not None and single > combined
            for single, combined in (
                (_median(row[key]), _median(best[key])) for key in ("speedup", "psnr_db")
            )
        ]
        if all(better):
            found.append(
                f"{row['name']} alone is both faster and closer than {best['name']}: it "
                f"{_speed(row, rows[0])}, {_fidelity(row, report)}."
            )
    return found


def interaction(report: dict[str, Any]) -> str:
    """What the two gains do to each other, in words; empty where there are not both."""
    both = report["interaction"]
    if both is None:
        return ""
    speed, fidelity = _median(both["speedup"]), _median(both["psnr_db"])
    if speed is None or fidelity is None:
        return ""
    within = both["speedup"]["p10"] <= 1 <= both["speedup"]["p90"]
    product = "the product of the two speed-ups"
    text = f"Both together are {speed:.2f} times as fast as {product}"
    if within:
        text = f"Both together are as fast as {product}, within the spread"
    if report["bundle"]["random_weights"]:
        return f"{text}."
    if abs(fidelity) < 0.5:
        return f"{text}, and their errors add up as independent ones do ({fidelity:+.1f} dB)."
    side = "better" if fidelity > 0 else "worse"
    return (
        f"{text}, and at {abs(fidelity):.1f} dB {side} than two independent errors of that size "
        f"would be ({count(both['samples'], 'sample')})."
    )


def _rival_note(rows: list[Row], report: dict[str, Any]) -> list[str]:
    """The combined variant against full precision that just takes fewer steps."""
    made = gains(rows)
    rivals = [row for row in rows[1:] if row not in made]
    if not made or not rivals:
        return []
    best, rival = made[-1], rivals[0]
    spacing = f", {rival['spacing']} spacing" if rival["spacing"] else ""
    text = (
        f"The rival, full precision with {rival['name']}{spacing}, {_speed(rival, rows[0])}, "
        f"{_fidelity(rival, report)}"
    )
    outcome = _outcome(best, rival)
    return [f"{text}: {outcome}." if outcome else f"{text}."]


def _outcome(best: Row, rival: Row) -> str:
    """Which of two is the better choice; a clause, empty where a figure is missing."""
    ours, theirs = _median(best["psnr_db"]), _median(rival["psnr_db"])
    fast, other = _median(best["speedup"]), _median(rival["speedup"])
    if ours is None or theirs is None or fast is None or other is None:
        return ""
    closer, longer = abs(ours - theirs), fast / other
    if ours > theirs:
        if longer >= 1:
            return f"{best['name']} is faster and {closer:.1f} dB closer"
        return f"{best['name']} is {closer:.1f} dB closer at {longer:.2f} times its speed"
    if longer <= EQUAL_TIME:
        return f"it is {closer:.1f} dB closer, so fewer steps are the better choice by PSNR"
    return (
        f"it is {closer:.1f} dB closer but takes {longer:.2f} times as long as {best['name']}, so "
        "this run does not say which is the better choice"
    )

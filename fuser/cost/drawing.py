"""A profile as one page that needs nothing else: the roofline with operators before and after fusion, and bars of the step."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from fuser.cost.profile import Measure, Profile, step_us

WIDTH, HEIGHT, EDGE = 760, 420, 56
BEFORE, AFTER = "#c2571a", "#1f6fb2"
SHADES = ("#1f6fb2", "#c2571a", "#3c8d40", "#8a4fa8", "#b8902a", "#2c8c8c", "#a83e5c", "#6b6b6b", "#5577dd", "#99552b")
STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:900px;margin:2em auto;color:#222}svg{width:100%;height:auto}"
    "text{font:11px system-ui,sans-serif;fill:#333}table{border-collapse:collapse;font-size:13px}"
    "td,th{padding:2px 9px;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
)


def page(profiles: Sequence[Profile]) -> str:
    """The page of one or more profiles."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>fuse profile</title>", f"<style>{STYLE}</style>"]
    for profile in profiles:
        title = f"{profile.model} on {profile.device}"
        step = f"{step_us(profile.before) / 1e3:.3f} ms before fusion, {step_us(profile.after) / 1e3:.3f} ms after"
        sizes = f"{escape(profile.dtype)}, batch {profile.batch}, context {profile.context}"
        parts += [
            f"<h2>{escape(title)}</h2><p>{sizes}: {step}.</p>",
            roofline(profile), bars(profile), *(_table(name, rows, profile) for name, rows in _sides(profile)),
        ]  # fmt: skip
    return "\n".join([*parts, "</html>", ""])


def _sides(profile: Profile) -> list[tuple[str, list[Measure]]]:
    return [("before fusion", profile.before), ("after fusion", profile.after)]


def roofline(profile: Profile) -> str:
    """TFLOP/s over FLOP a byte, both logarithmic, under what the device reaches; hollow before, full after."""
    points = [
        (one, colour)
        for rows, colour in ((profile.before, BEFORE), (profile.after, AFTER))
        for one in rows
        if one.flops > 0 and one.bytes > 0 and one.us > 0
    ]
    ridge = profile.product_tflops * 1e3 / profile.copy_gb_s
    intensities = [one.flops / one.bytes for one, _ in points] + [ridge]
    left, right = math.floor(math.log10(min(intensities))), math.ceil(math.log10(max(intensities))) + 1
    top = math.ceil(math.log10(profile.product_tflops * 1.5))
    bottom = math.floor(math.log10(min([one.tflops for one, _ in points] + [profile.product_tflops / 100])))

    def x(intensity: float) -> float:
        return EDGE + (math.log10(intensity) - left) / (right - left) * (WIDTH - 2 * EDGE)

    def y(rate: float) -> float:
        return HEIGHT - EDGE - (math.log10(rate) - bottom) / (top - bottom) * (HEIGHT - 2 * EDGE)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="roofline">']
    for power in range(left, right + 1):
        parts.append(_line(x(10**power), y(10**bottom), x(10**power), y(10**top), "#e4e4e4"))
        parts.append(_text(x(10**power), HEIGHT - EDGE + 16, f"{10**power:g}", "middle"))
    for power in range(bottom, top + 1):
        parts.append(_line(x(10**left), y(10**power), x(10**right), y(10**power), "#e4e4e4"))
        parts.append(_text(EDGE - 6, y(10**power) + 4, f"{10**power:g}", "end"))
    low = max(10**left, 10**bottom * 1e3 / profile.copy_gb_s)
    parts.append(_line(x(low), y(low * profile.copy_gb_s / 1e3), x(ridge), y(profile.product_tflops), "#222", 2))
    parts.append(_line(x(ridge), y(profile.product_tflops), x(10**right), y(profile.product_tflops), "#222", 2))
    parts.append(_text(x(10**right), y(profile.product_tflops) - 7, f"{profile.product_tflops:.3g} TFLOP/s", "end"))
    parts.append(_text(x(low) + 12, y(low * profile.copy_gb_s / 1e3) - 12, f"{profile.copy_gb_s:.0f} GB/s", "start"))
    for one, colour in points:
        fill = colour if colour == AFTER else "none"
        told = f"{one.name}: {one.us:.1f} us, {one.flops / one.bytes:.1f} FLOP/B, {one.tflops:.3g} TFLOP/s"
        parts.append(
            f'<circle cx="{x(one.flops / one.bytes):.1f}" cy="{y(one.tflops):.1f}" r="5" fill="{fill}" stroke="{colour}" '
            f'stroke-width="1.6"><title>{escape(told)}</title></circle>'
        )
    for i, (label, colour, fill) in enumerate((("before", BEFORE, "none"), ("after", AFTER, AFTER))):
        parts.append(f'<circle cx="{EDGE + 12}" cy="{EDGE + 2 + 18 * i}" r="5" fill="{fill}" stroke="{colour}"/>')
        parts.append(_text(EDGE + 22, EDGE + 6 + 18 * i, f"{label} fusion", "start"))
    parts.append(_text(WIDTH / 2, HEIGHT - 10, "FLOP a byte", "middle"))
    parts.append(_text(EDGE - 6, 22, "TFLOP/s", "start"))
    return "\n".join([*parts, "</svg>"])


def bars(profile: Profile) -> str:
    """What a step's time goes to, before and after, on one scale."""
    longest = max(step_us(rows) for _, rows in _sides(profile)) or 1.0
    names = list(dict.fromkeys(one.name for _, rows in _sides(profile) for one in rows))
    height = 120 + 16 * -(-len(names) // 3)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bars of the step">']
    for row, (side, rows) in enumerate(_sides(profile)):
        start, top = 110.0, 12 + 44 * row
        parts.append(_text(100, top + 19, side, "end"))
        for one in rows:
            width = one.count * one.us / longest * (WIDTH - 190)
            told = f"{one.name}: {one.count * one.us / 1e3:.3f} ms"
            parts.append(
                f'<rect x="{start:.1f}" y="{top}" width="{max(width, 0.2):.1f}" height="30" '
                f'fill="{_shade(names, one.name)}" stroke="#fff" stroke-width=".5"><title>{escape(told)}</title></rect>'
            )
            start += width
        parts.append(_text(start + 5, top + 19, f"{step_us(rows) / 1e3:.3f} ms", "start"))
    for i, name in enumerate(names):
        left, top = 110 + i % 3 * 215, 112 + i // 3 * 16
        parts.append(f'<rect x="{left}" y="{top - 9}" width="10" height="10" fill="{_shade(names, name)}"/>')
        parts.append(_text(left + 15, top, name, "start"))
    return "\n".join([*parts, "</svg>"])


def _shade(names: Sequence[str], name: str) -> str:
    return SHADES[names.index(name) % len(SHADES)]


def _table(title: str, rows: Sequence[Measure], profile: Profile) -> str:
    total = step_us(list(rows)) or 1.0

    def cells() -> Iterator[str]:
        for one in rows:
            found = (
                escape(one.name), str(one.count), str(one.launches), f"{one.us:.1f}", f"{one.count * one.us / total:.1%}",
                f"{one.bytes / 1e6:.2f}", f"{one.flops / 1e9:.3f}", f"{one.gb_s:.0f}", f"{one.tflops:.3g}",
                f"{profile.share_of_ceiling(one):.0%}",
            )  # fmt: skip
            yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in found) + "</tr>"

    heads = ("", "times", "launches", "us", "share", "MB", "GFLOP", "GB/s", "TFLOP/s", "of ceiling")
    header = "".join(f"<th>{head}</th>" for head in heads)
    return f"<h3>{title}</h3><table><tr>{header}</tr>{''.join(cells())}</table>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

"""Line charts as inline SVG: curves against steps, thinned to what a screen shows, with the value under the pointer.

Colours are the page's (CSS variables `--line-0`, `--line-1`, `--grid`, `--ink`), so a chart follows light and dark.
"""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 230, 52, 10, 12, 26
MOST = 400  # points of a curve that are drawn


def chart(title: str, curves: dict[str, Points], log: bool = False) -> str:
    """A figure with one line for each named curve; empty when there is nothing finite to draw.

    log: logarithmic values, where all of them are above 0.
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    kept = {name: thin(points) for name, points in kept.items() if points}
    if not kept:
        return ""
    log = log and all(y > 0 for points in kept.values() for _, y in points)
    scale = math.log10 if log else float
    xs = [x for points in kept.values() for x, _ in points]
    ys = [scale(y) for points in kept.values() for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in _ticks(low, high):
        y = place(x_low, 10**value if log else value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{10**value:.3g}" if log else f"{value:.4g}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value in _ticks(x_low, x_high):
        x = place(value, kept[next(iter(kept))][0][1])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{value:g}</text>')
    for number, (name, points) in enumerate(kept.items()):
        where = [place(x, y) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline class="line-{number % 2}" points="{line}"/>')
        if len(points) <= 60:
            dots = zip(where, points, strict=True)
            parts += [
                f'<circle class="dot-{number % 2}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(name)}, step {step:g}: {value:.5g}</title></circle>"
                for (x, y), (step, value) in dots
            ]
    names = "".join(f'<span class="key key-{n % 2}">{escape(name)}</span>' for n, name in enumerate(kept))
    return (
        f"<figure><figcaption>{escape(title)} {names}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MOST points: of each stretch the lowest and the highest, in order, so that no spike is lost."""
    if len(points) <= MOST:
        return list(points)
    stretch, kept = math.ceil(2 * len(points) / MOST), []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]

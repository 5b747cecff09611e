"""A line chart as SVG, written by hand: no plotting library is needed for a few points."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 48, 56
COLOURS = ("#c2410c", "#475569", "#0369a1", "#15803d")
TICKS = 5


def lines(title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draws each series as a line with a name beside the key; both axes begin at zero."""
    points = [point for each in series.values() for point in each]
    most_x = max(x for x, _ in points)
    most_y = 1.05 * max([1.0, *(y for _, y in points)])
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return round(LEFT + across * x / most_x, 1), round(TOP + down * (1 - y / most_y), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" fill="#0f172a">',
        "<style>text { font: 12px sans-serif } .title { font-size: 16px }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="28" class="title">{escape(title)}</text>',
        f'<text x="{LEFT + across / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text transform="translate(18 {TOP + down / 2}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>',
    ]
    for tick in range(TICKS + 1):
        x, y = most_x * tick / TICKS, tick / TICKS
        left, _ = place(x, 0)
        _, top = place(0, y)
        parts.append(f'<text x="{left}" y="{TOP + down + 18}" text-anchor="middle">{x:g}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{top + 4}" text-anchor="end">{y:g}</text>')
        parts.append(f'<line x1="{LEFT}" y1="{top}" x2="{LEFT + across}" y2="{top}" stroke="#e2e8f0"/>')
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in (place(*value) for value in values))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in (place(*value) for value in values)
        ]
        right = WIDTH - RIGHT - 150
        key_y = TOP + down * 0.35 + 18 * number
        parts.append(
            f'<line x1="{right}" y1="{key_y}" x2="{right + 20}" y2="{key_y}" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{right + 26}" y="{key_y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])

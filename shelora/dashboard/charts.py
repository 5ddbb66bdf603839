"""Curves and sparklines as inline SVG: the page and the report show the same ones. Pure; styles are in style.css.

The policy of the page allows no style attributes, so shapes carry presentation attributes and classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Final

from markupsafe import Markup

WIDTH: Final = 360
HEIGHT: Final = 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 12, 26
SPARK_WIDTH: Final = 96
SPARK_HEIGHT: Final = 18


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: a value for each training round, None where there is none."""

    name: str
    values: Sequence[float | None]
    words: Sequence[str]
    """Each value as people read it."""
    kind: str
    """Class of its colour: `a` or `b`."""


def line_chart(title: str, rounds: Sequence[int], series: Sequence[Series], *, unit: str = "") -> Markup:
    """Curves over rounds, with the last value in the accessible name, and every value in a tooltip.

    Args:
        title: What is drawn.
        rounds: Numbers of the rounds, increasing.
        series: One or two curves, as long as `rounds`.
        unit: "%" for shares, "B" for bytes, "" for plain numbers.
    """
    known = [v for s in series for v in s.values if v is not None]
    if not known:
        return Markup("")
    low, high, step = _scale(min(known), max(known), unit)
    frame = _Frame(first=rounds[0], last=rounds[-1], low=low, high=high)
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    lines = Markup("").join(_tick(frame, value, unit) for value in ticks)
    curves = Markup("").join(_curve(frame, rounds, one) for one in series)
    label = f"{title} by round: " + "; ".join(_last(one, rounds) for one in series)
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{lines}{labels}{curves}</svg>'
    ).format(w=WIDTH, h=HEIGHT, label=label, lines=lines, labels=_round_labels(frame, rounds), curves=curves)


def sparkline(heard: Sequence[bool | None], name: str) -> Markup:
    """A bar for each sample of a connection, oldest first: connected, silent, or not watched (None)."""
    share = sum(1 for h in heard if h) / max(1, sum(1 for h in heard if h is not None))
    bars = Markup("").join(
        Markup('<rect class="{c}" x="{x}" y="{y}" width="1.6" height="{h}"/>').format(
            c="up" if connected else "down",
            x=f"{SPARK_WIDTH - 2 * (len(heard) - i):.0f}",
            y=2 if connected else SPARK_HEIGHT - 6,
            h=SPARK_HEIGHT - 4 if connected else 4,
        )
        for i, connected in enumerate(heard)
        if connected is not None
    )
    return Markup(
        '<svg class="spark" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{bars}</svg>'
    ).format(
        w=SPARK_WIDTH,
        h=SPARK_HEIGHT,
        label=f"{name}: connected {share:.0%} of the time since this page watches",
        bars=bars,
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    first: int
    last: int
    low: float
    high: float

    def x(self, number: int) -> float:
        span = self.last - self.first
        inner = WIDTH - _LEFT - _RIGHT
        return _LEFT + (inner * (number - self.first) / span if span else inner / 2)

    def y(self, value: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (self.high - value) / (self.high - self.low)


def _scale(least: float, most: float, unit: str) -> tuple[float, float, float]:
    """Bounds and step with round numbers: at most six lines. Bytes and shares begin at zero; shares end at 1."""
    if unit == "%":
        return 0.0, 1.0, 0.25
    if unit == "B":
        least = 0.0
    span = (most - least) or abs(most) or 1.0
    power = 10 ** floor(log10(span / 4))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= span / 4)
    low, high = step * floor(least / step), step * ceil(most / step)
    return low, high if high > low else low + step, step


def _tick(frame: _Frame, value: float, unit: str) -> Markup:
    y = f"{frame.y(value):.1f}"
    return Markup(
        '<line class="grid" x1="{l}" x2="{r}" y1="{y}" y2="{y}"/>'
        '<text x="{t}" y="{y}" dy="4" text-anchor="end">{v}</text>'
    ).format(l=_LEFT, r=WIDTH - _RIGHT, t=_LEFT - 6, y=y, v=_axis(value, unit))


def _axis(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.0%}"
    if unit == "B":
        for name, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= factor:
                return f"{value / factor:g} {name}"
        return f"{value:g} B"
    return f"{value:g}" if abs(value) >= 1e-9 else "0"


def _round_labels(frame: _Frame, rounds: Sequence[int]) -> Markup:
    every = max(1, ceil(len(rounds) / 10))
    shown = [n for i, n in enumerate(rounds) if i % every == 0]
    return Markup("").join(
        Markup('<text x="{x}" y="{y}" text-anchor="middle">{n}</text>').format(
            x=f"{frame.x(n):.1f}", y=HEIGHT - 8, n=n
        )
        for n in shown
    )


def _curve(frame: _Frame, rounds: Sequence[int], series: Series) -> Markup:
    places = [
        (frame.x(n), frame.y(v), n, w)
        for n, v, w in zip(rounds, series.values, series.words, strict=True)
        if v is not None
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    line = Markup('<polyline class="{k}" points="{p}"/>').format(k=series.kind, p=path)
    return line + Markup("").join(
        Markup('<circle class="{k}" cx="{x}" cy="{y}" r="3"><title>{t}</title></circle>').format(
            k=series.kind, x=f"{x:.1f}", y=f"{y:.1f}", t=f"round {n}: {series.name} {w}"
        )
        for x, y, n, w in places
    )


def _last(series: Series, rounds: Sequence[int]) -> str:
    known = [(n, w) for n, v, w in zip(rounds, series.values, series.words, strict=True) if v is not None]
    if not known:
        return f"{series.name} unknown"
    number, words = known[-1]
    return f"{series.name} {words} in round {number}"

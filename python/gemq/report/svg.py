"""Inline SVG: escaped elements, axes, and the few marks that the figures are made of.

Colours are CSS classes, so that one drawing serves light and dark pages; text sizes are in units of a drawing about as
wide as a phone, so that it stays legible there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

_COUNTER = itertools.count(1)
# marks by series, besides colour: what a colour-blind reader tells lines apart by
DASHES = ("", "5 3", "2 2", "7 2 2 2", "1 3", "9 3")


def number(value: float, digits: int = 3) -> str:
    """A number for people: ``digits`` significant ones, thousands separated, no exponent between 1e-3 and 1e6."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def element(name: str, *children: str, text: str = "", **attributes: object) -> str:
    """One element; ``class_`` is ``class``, underscores are hyphens, text and attributes are escaped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items() if value is not None
    )
    inner = "".join(children) + escape(text)
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def drawing(title: str, description: str, width: float, height: float, *children: str, fixed: bool = False) -> str:
    """A whole ``<svg>`` with its title and description for readers who do not see it.

    ``fixed`` keeps its size (a wide map scrolls); otherwise it shrinks with the page.
    """
    name = f"g{next(_COUNTER)}"
    head = element("title", text=title, id=f"{name}t") + element("desc", text=description, id=f"{name}d")
    style = f"width:{width:.0f}px" if fixed else f"width:100%;max-width:{width * 1.2:.0f}px"
    return element(
        "svg", head, *children, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", style=style,
        aria_labelledby=f"{name}t {name}d", xmlns="http://www.w3.org/2000/svg",
    )


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None, **more: object) -> str:
    """A label."""
    return element("text", text=content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_,
                   **more)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values within ``low..high``, about ``count`` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / max(1, count - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999) * magnitude
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within ``low..high``, with round values between where there are few, thinned where many."""
    start, stop = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades <= 1 else (1, 2, 5) if decades <= 2 else (1,)
    every = max(1, (stop - start) // 6)
    found = [m * 10.0**e for e in range(start, stop + 1, every) for m in steps]
    kept = [v for v in found if low * 0.999 <= v <= high * 1.001]
    return kept if len(kept) > 1 else ticks(low, high, 4)


@dataclass(frozen=True)
class Scale:
    """Map from data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values to label."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)


def around(values: Sequence[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """A range with a margin around ``values``, from zero if ``zero``."""
    low, high = min(values), max(values)
    if log:
        factor = max(1.03, (high / low) ** 0.07)
        return low / factor, high * factor
    if zero:
        return 0.0, high * 1.12 or 1.0
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


@dataclass
class Plot:
    """Axes, grid and marks of one figure, ``width`` x ``height`` units with room for labels."""

    x: Scale
    y: Scale
    width: float
    height: float
    marks: list[str] = field(default_factory=list)

    @classmethod
    def over(
        cls, xs: tuple[float, float], ys: tuple[float, float], *, width: float = 380, height: float = 250,
        log: bool = False, left: float = 50,
    ) -> Plot:
        """An empty plot of data ranges ``xs`` and ``ys``."""
        return cls(Scale(*xs, left, width - 14), Scale(*ys, height - 40, 16, log), width, height)

    def axes(
        self, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None,
        x_format: Callable[[float], str] = number, y_format: Callable[[float], str] = number,
    ) -> None:
        """Grid lines, tick labels and names of both axes."""
        bottom, left, right = self.y.start, self.x.start, self.x.stop
        for value in self.y.ticks():
            y = self.y(value)
            self.marks.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="rule"))
            self.marks.append(text(left - 6, y + 4, y_format(value), "end", "tick"))
        for value in self.x.ticks() if x_ticks is None else x_ticks:
            x = self.x(value)
            self.marks.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            self.marks.append(text(x, bottom + 17, x_format(value), "middle", "tick"))
        self.marks.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        self.marks.append(text((left + right) / 2, self.height - 6, x_label, "middle", "label"))
        self.marks.append(text(2, 11, y_label, class_="label"))

    def line(self, points: Sequence[tuple[float, float]], class_: str, dash: str = "") -> None:
        """A line through data points."""
        at = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        self.marks.append(element("polyline", points=at, class_=f"line {class_}", stroke_dasharray=dash or None))

    def marker(self, x: float, y: float, class_: str, note: str) -> None:
        """A dot with a note that appears when pointed at."""
        self.marks.append(element("circle", element("title", text=note), cx=self.x(x), cy=self.y(y), r=4.5,
                                  class_=f"dot {class_}"))

    def bar(self, left: float, right: float, value: float, class_: str, note: str, base: float = 0.0) -> None:
        """A bar from ``base`` to ``value`` between two places on the x axis."""
        top, bottom = self.y(value), self.y(base)
        x, width = self.x(left), max(0.5, self.x(right) - self.x(left))
        self.marks.append(element("rect", element("title", text=note), x=x, y=min(top, bottom), width=width,
                                  height=abs(bottom - top), class_=class_))

    def draw(self, title: str, description: str) -> str:
        """The finished figure."""
        return drawing(title, description, self.width, self.height, *self.marks)

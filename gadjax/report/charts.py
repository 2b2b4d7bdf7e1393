"""Line and bar charts as inline SVG: axes, grid, legend; colours come from the page's style sheet (classes k0, k1, ...)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 34  # room around the plot for its axes
POINTS = 300  # more than a chart can show: longer series are drawn as means of equal pieces
SMOOTHED = 60  # from so many points on, a running mean is drawn over the line, which is faint
DOTTED = 20  # up to so many points have a dot each
COLOURS = 8  # of the style sheet: the classes k0 to k7
PRINTED = (
    "#5b6470",
    "#0b6bb5",
    "#c9540a",
    "#118a63",
    "#9a4fb0",
    "#b3892a",
    "#c23b62",
    "#2a8fa3",
)  # the same, where a file must hold its own
LANE = 28  # height of a lane of spans
LINE = 15  # height of a line of a figure's title and legend


@dataclass(frozen=True)
class Series:
    """One line. `y` may hold NaN, where the line is broken; `colour` is an index of the style sheet's colours."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int


@dataclass(frozen=True)
class Span:
    """Something that takes time: in which lane it is drawn, its name, when it begins and ends."""

    lane: str
    label: str
    start: float
    end: float
    colour: int


@dataclass(frozen=True)
class Chart:
    """A drawing with what the page sets around it."""

    title: str
    unit: str
    svg: Markup
    legend: tuple[tuple[str, int, str], ...]  # label, colour, last value


def line_chart(title: str, unit: str, series: Sequence[Series], from_zero: bool = False, x_label: str = "step") -> Chart:
    """Lines over the step, or what `x_label` names. The y axis spans the finite values, and 0 where `from_zero`."""
    drawn = [_thinned(line) for line in series]
    xs = [x for line in drawn for x in line.x]
    ys = [y for line in drawn for y in line.y if math.isfinite(y)]
    x_axis = _Axis.over(xs or [0], LEFT, WIDTH - RIGHT, padded=False)
    y_axis = _Axis.over((ys or [0]) + [0] * from_zero, HEIGHT - BOTTOM, TOP, padded=True)
    parts = [_grid(x_axis, y_axis), *(_line(line, x_axis, y_axis) for line in drawn)]
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - RIGHT, HEIGHT - 4, x_label))
    legend = tuple((line.label, line.colour % COLOURS, _last(line.y)) for line in series)
    return Chart(title, unit, _svg(f"{title} ({unit})", parts), legend)


def bar_chart(
    title: str,
    unit: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    colours: Mapping[str, int],
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Chart:
    """Bars side by side: per group one bar of every series. The y axis starts at 0; what an interval has below is cut off."""
    width, whiskers = 2 * WIDTH, intervals or {}
    highest = [*(value for values in series.values() for value in values), *(high for spans in whiskers.values() for _, high in spans)]
    y_axis = _Axis.over([0, *highest], HEIGHT - BOTTOM, TOP, padded=False)
    band = (width - LEFT - RIGHT) / len(groups)
    bar = 0.8 * band / len(series)
    name = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    rect = Markup('<rect class="k{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}, {}: {}</title></rect>')
    whisker = Markup('<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>')
    parts = [_rules(y_axis, width)]
    for g, group in enumerate(groups):
        start = LEFT + (g + 0.1) * band
        parts.append(name.format(start + 0.4 * band, HEIGHT - BOTTOM + 15, group))
        for s, (label, values) in enumerate(series.items()):
            top = y_axis.at(values[g])
            text = (label, group, number(values[g]))
            parts.append(rect.format(colours[label] % COLOURS, start + s * bar, top, 0.92 * bar, HEIGHT - BOTTOM - top, *text))
            if label in whiskers:
                low, high = whiskers[label][g]
                parts.append(whisker.format(start + (s + 0.46) * bar, y_axis.at(max(low, 0)), y_axis.at(high)))
    return Chart(title, unit, _svg(f"{title} ({unit})", parts, width), tuple((label, colours[label] % COLOURS, "") for label in series))


def span_chart(title: str, unit: str, spans: Sequence[Span]) -> Chart:
    """What happens when: a lane below the other for each kind of worker, time to the right from 0. The legend tells how long each takes."""
    width, lanes = 2 * WIDTH, [*dict.fromkeys(span.lane for span in spans)]
    axis = _Axis.over([0, *(span.end for span in spans)], LEFT, width - RIGHT, padded=False)
    low = TOP + LANE * len(lanes)
    rule = Markup('<line class="rule" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
    text = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>')
    rect = Markup('<rect class="k{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}: {} to {} s</title></rect>')
    parts = [rule.format(axis.at(x), TOP, low) + text.format(axis.at(x), low + 15, "middle", number(x)) for x in axis.ticks(8)]
    parts += [text.format(LEFT - 6, TOP + LANE * row + 18, "end", lane) for row, lane in enumerate(lanes)]
    lasts: dict[str, float] = {}
    for span in spans:
        place, size = axis.at(span.start), axis.at(span.end) - axis.at(span.start)
        told = (span.label, number(span.start), number(span.end))
        parts.append(rect.format(span.colour % COLOURS, place, TOP + LANE * lanes.index(span.lane) + 3, max(size, 1), LANE - 6, *told))
        lasts[span.label] = lasts.get(span.label, 0.0) + span.end - span.start
    colours = {span.label: span.colour % COLOURS for span in spans}
    legend = tuple((label, colours[label], f"{number(lasts[label])} s") for label in colours)
    return Chart(title, unit, _svg(f"{title} ({unit})", parts, width, low + 20), legend)


def figure(chart: Chart, width: int = WIDTH) -> str:
    """A chart as an SVG file that stands alone: with its title, its legend and its colours, on white."""
    colours = Markup("").join(Markup(".k{0}{{fill:{1};stroke:{1}}}").format(k, colour) for k, colour in enumerate(PRINTED))
    style = Markup(
        "<style>.paper{{fill:#fff}}text{{font:11px sans-serif;fill:#1d2126;stroke:none}}.rule{{stroke:#e4e6ea}}.axis{{stroke:#9aa2ad}}"
        "{}.line{{fill:none;stroke-width:1.7}}.faint{{stroke-width:1;opacity:0.3}}</style>"
    ).format(colours)
    head = LINE * (1 + len(chart.legend))
    text = Markup('<text x="{}" y="{}">{}</text>')
    square = Markup('<rect class="k{}" x="{}" y="{}" width="8" height="8"/>')
    parts = [text.format(LEFT, LINE - 3, f"{chart.title} ({chart.unit})")]
    for row, (label, colour, _) in enumerate(chart.legend, 2):
        parts += [square.format(colour, LEFT, LINE * row - 12), text.format(LEFT + 13, LINE * row - 4, label)]
    frame = Markup('<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}">{2}<rect class="paper" width="{0}" height="{1}"/>')
    inner = chart.svg.replace("<svg ", Markup('<svg y="{}" width="{}" height="{}" ').format(head, width, HEIGHT), 1)
    return str(frame.format(width, head + HEIGHT, style) + Markup("").join(parts) + inner + Markup("</svg>\n"))


@dataclass(frozen=True)
class _Axis:
    """Values low..high on the pixels start..end, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, padded: bool) -> "_Axis":
        found = list(values)
        low, high = min(found), max(found)
        if low == high:
            low, high = low - (abs(low) or 1) * 0.5 * padded, high + (abs(high) or 1) * 0.5
        room = (high - low) * 0.05 * padded
        return cls(max(low - room, 0) if low >= 0 else low - room, high + room, start, end)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as an axis or a legend shows it."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _svg(label: str, parts: Sequence[Markup], width: int = WIDTH, height: int = HEIGHT) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)
    return head + Markup("").join(parts) + Markup("</svg>")


def _grid(x_axis: _Axis, y_axis: _Axis) -> Markup:
    ticks = [x for x in x_axis.ticks(6) if x == int(x)]
    text = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    return _rules(y_axis, WIDTH) + Markup("").join(text.format(x_axis.at(x), HEIGHT - BOTTOM + 15, number(x)) for x in ticks)


def _rules(y_axis: _Axis, width: int) -> Markup:
    rule = Markup('<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    text = Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>')
    lines = [rule.format("rule", LEFT, width - RIGHT, y_axis.at(y), y_axis.at(y)) for y in y_axis.ticks(5)]
    lines += [text.format(LEFT - 6, y_axis.at(y) + 4, number(y)) for y in y_axis.ticks(5)]
    return Markup("").join(lines) + rule.format("axis", LEFT, width - RIGHT, HEIGHT - BOTTOM, HEIGHT - BOTTOM)


def _line(line: Series, x_axis: _Axis, y_axis: _Axis) -> Markup:
    """The line, with dots where it is short; a long one is faint under its running mean."""
    colour = line.colour % COLOURS
    path = Markup('<path class="line k{} {}" d="{}"><title>{}</title></path>')
    long = len(line.x) >= SMOOTHED
    drawing = path.format(colour, "faint" if long else "", _path(line.x, line.y, x_axis, y_axis), line.label)
    if long:
        drawing += path.format(colour, "", _path(line.x, _running_mean(line.y), x_axis, y_axis), line.label)
    if len(line.x) <= DOTTED:
        dot = Markup('<circle class="k{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>')
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        drawing += Markup("").join(dot.format(colour, x_axis.at(x), y_axis.at(y)) for x, y in points)
    return drawing


def _path(xs: Sequence[float], ys: Sequence[float], x_axis: _Axis, y_axis: _Axis) -> str:
    commands, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            commands.append(f"{pen}{x_axis.at(x):.1f} {y_axis.at(y):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    return "".join(commands)


def _thinned(line: Series) -> Series:
    size = math.ceil(len(line.x) / POINTS)
    if size <= 1:
        return line
    pieces = range(0, len(line.x), size)
    return Series(line.label, [_mean(line.x[i : i + size]) for i in pieces], [_mean(line.y[i : i + size]) for i in pieces], line.colour)


def _running_mean(ys: Sequence[float]) -> list[float]:
    half = max(len(ys) // 40, 2)
    return [_mean(ys[max(i - half, 0) : i + half + 1]) for i in range(len(ys))]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _last(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return number(finite[-1]) if finite else "no finite value"

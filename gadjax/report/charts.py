"""Line and bar charts as inline SVG: axes, grid, legend; colours come from the page's style sheet (classes k0, k1, ...)."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gadjax.evaluation.statistics import Estimate

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 34  # room around the plot for its axes
POINTS = 300  # more than a chart can show: longer series are drawn as means of equal pieces
SMOOTHED = 60  # from so many points on, a running mean is drawn over the line, which is faint
DOTTED = 20  # up to so many points have a dot each
COLOURS = 12  # of the style sheet: the classes k0 to k11
PRINTED = (
    "#5b6470",
    "#0b6bb5",
    "#c9540a",
    "#118a63",
    "#9a4fb0",
    "#b3892a",
    "#c23b62",
    "#2a8fa3",
    "#7a5230",
    "#4a4fc4",
    "#77942a",
    "#d873b0",
)  # the same, where a file must hold its own
BAR = 60  # most that a bar of a mean is wide
LETTER = 6  # width of a letter of a label
LANE = 28  # height of a lane of spans
LINE = 15  # height of a line of a figure's title and legend


@dataclass(frozen=True)
class Series:
    """One line. `y` may hold NaN, where the line is broken; `colour` is an index of the style sheet's colours; `low` and `high`, where
    there are some, are the edges of a band about it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()


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
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(title: str, unit: str, series: Sequence[Series], from_zero: bool = False, x_label: str = "step") -> Chart:
    """Lines over the step, or what `x_label` names. The y axis spans the finite values, and 0 where `from_zero`; of bands as much as the
    lines take, above and below: what is beyond is cut off.
    """
    drawn = [_thinned(line) for line in series]
    xs = [x for line in drawn for x in line.x]
    ys = [y for line in drawn for y in line.y if math.isfinite(y)]
    x_axis = _Axis.over(xs or [0], LEFT, WIDTH - RIGHT, padded=False)
    edges = [edge for line in drawn for edge in (*line.low, *line.high) if math.isfinite(edge)]
    if ys and edges:
        low, high = min(ys), max(ys)
        room = high - low or math.inf
        ys += [min(max(edge, low - room), high + room) for edge in edges]
    y_axis = _Axis.over((ys or [0]) + [0] * from_zero, HEIGHT - BOTTOM, TOP, padded=True)
    parts = [
        _grid(x_axis, y_axis),
        *(_band(line, x_axis, y_axis) for line in drawn if line.low),
        *(_line(line, x_axis, y_axis) for line in drawn),
    ]
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - RIGHT, HEIGHT - 4, x_label))
    legend = tuple((line.label, line.colour % COLOURS, _last(line.y)) for line in series)
    return Chart(title, unit, _svg(f"{title} ({unit})", parts), legend)


def bar_chart(title: str, unit: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], colours: Mapping[str, int]) -> Chart:
    """Bars side by side: per group one bar of every series. They grow from zero."""
    width = 2 * WIDTH
    y_axis = _Axis.over([0, *(value for values in series.values() for value in values)], HEIGHT - BOTTOM, TOP, padded=False)
    band = (width - LEFT - RIGHT) / len(groups)
    bar = 0.8 * band / len(series)
    parts = [_rules(y_axis, width)]
    for g, group in enumerate(groups):
        start = LEFT + (g + 0.1) * band
        parts.append(_NAME.format(start + 0.4 * band, HEIGHT - BOTTOM + LINE, group))
        for s, (label, values) in enumerate(series.items()):
            parts.append(_bar(start + s * bar, 0.92 * bar, values[g], y_axis, colours[label], f"{label}, {group}"))
    legend = tuple((label, colours[label] % COLOURS, "") for label in series)
    return Chart(title, unit, _svg(f"{title} ({unit})", parts, width), legend, width)


def mean_chart(title: str, unit: str, means: Mapping[str, Estimate], colours: Mapping[str, int]) -> Chart:
    """A bar for each mean, its name below, and a whisker from end to end of its interval, where it has one. Bars grow from zero."""
    width = 2 * WIDTH
    ends = [end for each in means.values() for end in (each.mean, each.low, each.high) if math.isfinite(end)]
    y_axis = _Axis.over([0, *ends], HEIGHT - BOTTOM, TOP, padded=False)
    band = (width - LEFT - RIGHT) / len(means)
    bar = min(0.6 * band, BAR)
    whisker = Markup('<path class="whisker" d="M{1:.1f} {3:.1f}H{2:.1f}M{0:.1f} {3:.1f}V{4:.1f}M{1:.1f} {4:.1f}H{2:.1f}"/>')
    names = {label: textwrap.wrap(label, max(int(band / LETTER), 1)) for label in means}
    parts = [_rules(y_axis, width)]
    for i, (label, each) in enumerate(means.items()):
        middle = LEFT + (i + 0.5) * band
        parts.append(_bar(middle - bar / 2, bar, each.mean, y_axis, colours[label], label))
        if math.isfinite(each.low) and math.isfinite(each.high):
            parts.append(whisker.format(middle, middle - 4, middle + 4, y_axis.at(each.low), y_axis.at(each.high)))
        parts += [_NAME.format(middle, HEIGHT - BOTTOM + LINE * row, line) for row, line in enumerate(names[label], 1)]
    height = HEIGHT + LINE * (max(map(len, names.values())) - 1)
    return Chart(title, unit, _svg(f"{title} ({unit})", parts, width, height), (), width, height)


_NAME = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')


def _bar(left: float, width: float, value: float, y_axis: "_Axis", colour: int, label: str) -> Markup:
    """From zero up to the value, or down to it."""
    top, foot = y_axis.at(max(value, 0)), y_axis.at(min(value, 0))
    rect = Markup('<rect class="k{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}: {}</title></rect>')
    return rect.format(colour % COLOURS, left, top, width, foot - top, label, number(value))


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


def figure(chart: Chart, caption: str = "") -> str:
    """A chart as an SVG file that stands alone, on white: title, caption, legend, and the unit along the value axis."""
    colours = Markup("").join(Markup(".k{0}{{fill:{1};stroke:{1}}}").format(k, colour) for k, colour in enumerate(PRINTED))
    style = Markup(
        "<style>.paper{{fill:#fff}}text{{font:11px sans-serif;fill:#1d2126;stroke:none}}.title{{font-weight:bold}}.rule{{stroke:#e4e6ea}}"
        ".axis{{stroke:#9aa2ad}}{}.line{{fill:none;stroke-width:1.7}}.faint{{stroke-width:1;opacity:0.3}}.band{{stroke:none;opacity:0.15}}"
        ".whisker{{fill:none;stroke:#1d2126;stroke-width:1.2}}</style>"
    ).format(colours)
    left = LEFT + LINE
    text = Markup('<text class="{}" x="{}" y="{}">{}</text>')
    parts = [text.format("title", left, LINE - 3, chart.title)]
    parts += [text.format("", left, 2 * LINE - 3, caption)] if caption else []
    head = LINE * len(parts)
    for label, colour, _ in chart.legend:
        parts.append(Markup('<rect class="k{}" x="{}" y="{}" width="8" height="8"/>').format(colour, left, head + 3))
        parts.append(text.format("", left + 13, head + 11, label))
        head += LINE
    upwards = Markup('<text text-anchor="middle" transform="translate({} {}) rotate(-90)">{}</text>')
    parts.append(upwards.format(LINE - 3, head + (TOP + HEIGHT - BOTTOM) / 2, chart.unit))
    frame = Markup('<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}">{2}<rect class="paper" width="{0}" height="{1}"/>')
    place = Markup('<svg x="{}" y="{}" width="{}" height="{}" ').format(LINE, head, chart.width, chart.height)
    drawing = chart.svg.replace("<svg ", place, 1)
    return str(frame.format(LINE + chart.width, head + chart.height, style) + Markup("").join(parts) + drawing + Markup("</svg>\n"))


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
    base = y_axis.at(min(max(0, y_axis.low), y_axis.high))  # zero, where it is on the axis
    return Markup("").join(lines) + rule.format("axis", LEFT, width - RIGHT, base, base)


def _line(line: Series, x_axis: _Axis, y_axis: _Axis) -> Markup:
    """The line, with dots where it is short; a long one is faint under its running mean, unless it is the middle of a band."""
    colour = line.colour % COLOURS
    path = Markup('<path class="line k{} {}" d="{}"><title>{}</title></path>')
    long = len(line.x) >= SMOOTHED and not line.low
    drawing = path.format(colour, "faint" if long else "", _path(line.x, line.y, x_axis, y_axis), line.label)
    if long:
        drawing += path.format(colour, "", _path(line.x, running_mean(line.y), x_axis, y_axis), line.label)
    if len(line.x) <= DOTTED:
        dot = Markup('<circle class="k{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>')
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        drawing += Markup("").join(dot.format(colour, x_axis.at(x), y_axis.at(y)) for x, y in points)
    return drawing


def _band(line: Series, x_axis: _Axis, y_axis: _Axis) -> Markup:
    """What lies between the edges, within the axis."""
    edges = [edge for edge in zip(line.x, line.low, line.high, strict=True) if all(map(math.isfinite, edge))]
    points = [(x, low) for x, low, _ in edges] + [(x, high) for x, _, high in reversed(edges)]
    inside = [(x_axis.at(x), y_axis.at(min(max(y, y_axis.low), y_axis.high))) for x, y in points]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in inside)
    return Markup('<polygon class="k{} band" points="{}"/>').format(line.colour % COLOURS, corners)


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

    def means(values: Sequence[float]) -> list[float]:
        return [_mean(values[i : i + size]) for i in range(0, len(values), size)]

    return Series(line.label, means(line.x), means(line.y), line.colour, means(line.low), means(line.high))


def running_mean(ys: Sequence[float]) -> list[float]:
    """Of each value with its neighbours, a fortieth of the length on either side; values that are not finite are left out."""
    half = max(len(ys) // 40, 2)
    return [_mean(ys[max(i - half, 0) : i + half + 1]) for i in range(len(ys))]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _last(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return number(finite[-1]) if finite else "no finite value"

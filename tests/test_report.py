"""The report page: what it shows, that hostile text stays text, and the charts' geometry."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gadjax.config import make_config
from gadjax.errors import UserError
from gadjax.evaluation.statistics import Estimate
from gadjax.metrics import MetricsLog
from gadjax.report import charts
from gadjax.report.charts import Series, bar_chart, line_chart, mean_chart, number
from gadjax.report.curves import PANELS, meaning, stage_charts, validation_charts
from gadjax.report.page import write_report
from gadjax.train import _Page

HOSTILE = "</pre></main><script>alert(1)</script><img src=x onerror=alert(2)>\"'& {{ 7 * 7 }} \ud800"
LINKS = {"src", "href", "srcset", "data", "action", "poster"}
VOID = {"meta", "br", "img", "line", "circle"}


class Page(HTMLParser):
    """Reads a page: every tag must be closed in order; collects tags, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.links, self.texts = list[str](), list[str](), list[str](), list[str]()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in LINKS or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)

    def handle_endtag(self, tag: str):
        assert self.open.pop() == tag

    def handle_data(self, data: str):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def answer_row(i: int, text: str, style: str | None = None) -> dict[str, Any]:
    mark = {"valid": True, "correct": False, "style": style} if style else {}
    sample = {"text": text, "tokens": 7, "log_prob": -1.0, "truncated": i == 0} | mark
    messages = [{"role": "user", "content": f"question {i} {HOSTILE}"}]
    return {"id": f"p{i}", "messages": messages, "teacher": {"text": f"taught {i}"} | mark, "greedy": [sample], "sampled_0_8": [sample]}


def write_answers(run: Path, stage: str, rows: list[dict[str, Any]]):
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{stage}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


SUMMARY = {
    "stages": {"seqkd": {"rouge_l": 0.25, "mine<b>": 1.0}, "gad": {"rouge_l": 0.5, "mine<b>": None}},
    "intervals": {"seqkd": {"rouge_l": [0.2, 0.3], "mine<b>": [0.5, 1.125]}, "gad": {"rouge_l": [0.4, 0.6]}},
    "differences": {"gad": {"rouge_l": {"mean": 0.25, "low": 0.125, "high": 0.375}}},
    "baseline": "seqkd",
    "prompts": 3,
    "seconds": 3700.0,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two stages with everything that a report shows; all texts in it are hostile."""
    folder = tmp_path / "quick<start>"
    for stage in ("seqkd", "gad"):
        with MetricsLog(folder / "stages" / stage, folder / "tensorboard" / stage) as log:
            for step in range(1, 4):
                log.write(step, {"student/loss": 1 / step, "validation/rouge_l": 0.1 * step, "validation/new<b>": math.nan})
        write_answers(folder, stage, [answer_row(i, f"{stage} says {i} {HOSTILE}", style="song") for i in range(3)])
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def page(folder: Path) -> Page:
    return Page(write_report(folder, ["student", "seqkd", "gad"]).read_text(encoding="utf-8"))


def test_the_page_shows_everything(run: Path):
    text = page(run).text
    for words in ("quick<start>", "1 h 1 min in all", "3 validation prompts", "mine<b>", "Comparison", "Styles", "Answers", "Stage gad"):
        assert words in text, words
    assert "0.250 ± 0.050" in text and "1.000 [0.500, 1.125]" in text
    assert "+0.250 ± 0.125" in text
    assert "taught 2" in text
    assert "gad says 2" in text
    assert "7 tokens, cut off, style song, valid, not correct" in text
    assert text.count("teacher") >= 3


def test_hostile_text_stays_text(run: Path):
    found = page(run)
    assert not {"script", "img", "iframe", "object", "link", "base"} & set(found.tags)
    assert all(re.fullmatch(r"#[a-z0-9-]+", link) for link in found.links), found.links
    assert "<script>alert(1)</script>" in found.text
    assert "{{ 7 * 7 }}" in found.text


def test_the_page_loads_nothing(run: Path):
    html = write_report(run, ["seqkd", "gad"]).read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|@import|url\(", html)


def test_a_style_that_is_used_twice_as_often_has_a_bar_twice_as_high():
    chart = bar_chart(
        "Styles", "share", ["song", "none"], {"teacher": [0.5, 0.25], "gad": [0.25, 0.0]}, {"teacher": 0, "gad": charts.COLOURS + 1}
    )
    bars = [(colour, float(height)) for colour, height in re.findall(r'<rect class="(k\d)".*?height="([\d.]+)"', chart.svg)]
    assert [colour for colour, _ in bars] == ["k0", "k1", "k0", "k1"]
    assert bars[0][1] == pytest.approx(2 * bars[1][1], abs=0.2)
    assert bars[1][1] == pytest.approx(bars[2][1], abs=0.2)
    assert bars[3][1] == 0


def test_bars_of_means_grow_from_zero_and_whiskers_go_from_end_to_end():
    means = {"seqkd": Estimate(-1.2, -1.5, -0.9), "gad": Estimate(0.6, 0.3, 0.9), "one-seed": Estimate(0.3, math.nan, math.nan)}
    svg = mean_chart("referee_score", "logit", means, {name: number for number, name in enumerate(means)}).svg
    bars = [tuple(map(float, found)) for found in re.findall(r'<rect class="k\d+".*? y="([\d.]+)".*?height="([\d.]+)"', svg)]
    whiskers = [tuple(map(float, found)) for found in re.findall(r'class="whisker" d="\S+ ([\d.]+)H\S+ [\d.]+V([\d.]+)', svg)]
    (zero,) = map(float, re.findall(r'<line class="axis".*?y1="([\d.]+)"', svg))
    scale = bars[0][1] / 1.2  # of the first, which hangs down
    assert bars[0][0] == zero and bars[0][1] > 80
    for (top, height), value in zip(bars[1:], (0.6, 0.3), strict=True):
        assert (top + height, height) == pytest.approx((zero, scale * value), abs=0.2)
    for found, (low, high) in zip(whiskers, ((-1.5, -0.9), (0.3, 0.9)), strict=True):
        assert found == pytest.approx((zero - scale * low, zero - scale * high), abs=0.2)
    assert re.findall(r'text-anchor="middle">(.*?)<', svg) == [*means]


def test_a_long_name_below_a_bar_is_broken():
    names = [f"a-rather-long-name-{index}" for index in range(9)]
    chart = mean_chart("t", "u", {name: Estimate(1, 1, 1) for name in names}, dict.fromkeys(names, 0))
    assert re.findall(r'text-anchor="middle">(.*?)<', chart.svg)[:2] == ["a-rather-long-", "name-0"]
    assert chart.height > bar_chart("t", "u", ["g"], {"a": [1.0]}, {"a": 0}).height


def test_ten_stages_have_ten_colours():
    style = (Path(charts.__file__).parent / "style.css").read_text()
    assert len(set(charts.PRINTED)) == charts.COLOURS >= 10
    assert all(style.count(f"--k{index}: ") == 2 and f"i.k{index} " in style for index in range(charts.COLOURS)), "light and dark"


def test_a_line_of_several_runs_is_their_mean_with_a_band():
    runs = [[{"step": step, "validation/loss": value + 0.1 * run} for step, value in enumerate((1.0, 3.0, 2.0))] for run in (-1, 0, 1)]
    runs[0].append({"step": 3, "validation/loss": 9.0})  # a step that the others do not have
    (mean,), (alone,) = (validation_charts({"gad": which}, {"gad": 1}) for which in (runs, runs[1:2]))
    assert "band" not in alone.svg and mean.legend == alone.legend == (("gad", 1, "2"),)
    (corners,) = re.findall(r'<polygon class="k1 band" points="(.*?)"', mean.svg)
    edges = [float(point.split(",")[1]) for point in corners.split()]
    ((*line,),) = path_of(mean.svg)
    half = 4.3026527 * 0.1 / math.sqrt(3)  # Student's t with two degrees of freedom
    scale = (line[0][1] - line[1][1]) / 2  # pixels of one
    assert [low - y for low, (_, y) in zip(edges[:3], line, strict=True)] == pytest.approx([half * scale] * 3, abs=0.2)
    assert [y - high for high, (_, y) in zip(edges[:2:-1], line, strict=True)] == pytest.approx([half * scale] * 3, abs=0.2)


def test_of_a_wide_band_as_much_is_seen_as_the_lines_take():
    wide = Series("a", [1, 2], [0.0, 1.0], 1, low=[-100.0, -100.0], high=[100.0, 100.0])
    ys = [y for _, y in path_of(line_chart("t", "u", [wide]).svg)[0]]
    assert ys[0] - ys[1] == pytest.approx((196 - 8) / 3.3, abs=0.2), "a third, with 5 % of room on either side"


def test_styles_are_shares_of_the_samples(run: Path):
    write_answers(run, "gad", [answer_row(i, "x", style="song" if i else "none") for i in range(3)])
    found = page(run).text
    assert "gad, song: 0.6667" in found
    assert "gad, none: 0.3333" in found
    assert "teacher, song: 1" in found


def test_without_the_tutor_there_are_no_styles(run: Path):
    for stage in ("seqkd", "gad"):
        write_answers(run, stage, [answer_row(i, "x") for i in range(3)])
    text = page(run).text
    assert "style song" not in text and "<h3>Styles" not in text and "Words of an answer" in text and "Markdown" not in text


def test_lengths_and_markdown_are_shares_of_the_answers(run: Path):
    write_answers(run, "seqkd", [answer_row(i, "# One\n- two\n- three" if i else "one") for i in range(3)])
    write_answers(run, "gad", [answer_row(i, "word " * 40) for i in range(3)])
    text = page(run).text
    for told in ("seqkd, with a list: 0.6667", "gad, with a list: 0", "teacher, with a heading: 0", "seqkd, 0–3: 1", "gad, 40–43: 1"):
        assert told in text, told


def keep(run: Path, stage: str, step: int, *texts: str):
    folder = run / "stages" / stage / "answers"
    folder.mkdir(exist_ok=True)
    rows = [{"id": f"p{i}", "messages": [{"role": "user", "content": f"question {i} {HOSTILE}"}]} for i in range(len(texts))]
    rows = [row | {"teacher": {"text": "taught"}, "greedy": [{"text": text, "tokens": 3}]} for row, text in zip(rows, texts, strict=True)]
    (folder / f"{step}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_answers_are_followed_through_the_run(run: Path):
    """The steps of `run` are 1 to 3."""
    for step, text in ((1, "early"), (2, "same"), (3, "same"), (9, "of another trial")):
        keep(run, "seqkd", step, text, "other")
    keep(run, "gad", 3, f"late {HOSTILE}", "other")
    text = page(run).text
    section = text[text.index("are told once") : text.index("validation prompts, evenly spread")]
    order = [
        "question 0",
        "taught",
        "seqkd step 1",
        "early",
        "seqkd steps 2 to 3",
        "same",
        "gad step 3",
        "late",
        "question 1",
        "steps 1 to 3",
    ]
    places = [section.index(told) for told in order]
    assert places == sorted(places)
    assert section.count("same") == 1 and "another trial" not in text


def test_of_many_answers_the_first_and_the_last_are_among_those_shown(tmp_path: Path):
    with MetricsLog(tmp_path / "stages" / "gad", tmp_path / "tensorboard") as log:
        for step in range(100):
            log.write(step, {"student/loss": 1.0})
            keep(tmp_path, "gad", step, f"says {step}.")
    assert re.findall(r"gad step (\d+) says", page(tmp_path).text) == ["0", "19", "39", "59", "79", "99"]


def test_where_the_time_went(run: Path):
    with MetricsLog(run / "stages" / "gad", run / "tensorboard" / "gad") as log:
        for step in (1, 2):
            log.write(step, {"time/rollout_seconds": 45.0, "time/student_seconds": 15.0, "time/idle_fraction": 0.5})
    text = page(run).text
    assert "gad 75.0% 1 min 30 s 25.0% 30 s 2 min 0 s" in text
    assert "59 min 40 s went elsewhere" in text


def spans(html: str, stage: str) -> list[tuple[str, float, float]]:
    """What is drawn of a step: its name and its lane's height, where it begins and ends."""
    drawn = html[html.index(f"A step of {stage}") :].split("</svg>", maxsplit=1)[0]
    found = re.findall(r'<rect class="k\d" x="([\d.]+)" y="(\d+)" width="([\d.]+)" height="\d+"><title>([\w ]+):', drawn)
    return [(f"{label} {y}", float(x), float(x) + float(width)) for x, y, width, label in found]


def test_a_step_as_it_runs(run: Path):
    """Each part as long as its median; the devices wait from the rollout's end until its answers are read and packed."""
    parts = {"rollout": 40.0, "data": 10.0, "discriminator": 20.0, "student": 30.0, "host/answers": 5.0, "host/packing": 8.0}
    with MetricsLog(run / "stages" / "gad", run / "tensorboard" / "gad") as log:
        for step, slow in ((1, 90.0), (2, 1.0), (3, 1.0)):  # the first one is compiled
            own = {f"time/{name}_seconds": value * slow for name, value in parts.items()}
            log.write(step, own | ({"time/host/metrics_seconds": 15.0} if step > 1 else {}))
    with MetricsLog(run / "stages" / "seqkd", run / "tensorboard" / "seqkd") as log:
        log.write(
            1, {"time/data_seconds": 2.0, "time/student_seconds": 10.0, "time/host/packing_seconds": 2.0, "time/host/metrics_seconds": 1.0}
        )
    html = write_report(run, ["seqkd", "gad"]).read_text(encoding="utf-8")
    second = (950 - 52) / 100
    times = [(0, 35), (50, 70), (70, 100), (35, 40), (40, 50), (50, 58), (70, 85)]
    names = ["rollout 11", "discriminator 11", "student 11", "answers read 39", "packing 39", "packing 39", "metrics 39"]
    found = spans(html, "gad")
    assert [name for name, _, _ in found] == names
    assert [place for _, *places in found for place in places] == pytest.approx(
        [52 + at * second for both in times for at in both], abs=0.2
    )
    text = Page(html).text
    assert "the devices wait for the host 15.0% of it" in text and "packing 18 s" in text
    assert [name for name, _, _ in spans(html, "seqkd")] == ["student 11", "packing 39", "metrics 39"], "packed beside the step before"
    assert "2 h 33 min" in text, "what lies beside a part is not counted twice"


def test_only_prompts_that_all_stages_answered_are_shown_and_not_too_many(run: Path):
    write_answers(run, "seqkd", [answer_row(i, f"seqkd says {i}.") for i in range(100)])
    write_answers(run, "gad", [answer_row(i, f"gad says {i}.") for i in range(50, 100)])
    text = page(run).text
    shown = [int(i) for i in re.findall(r"seqkd says (\d+)\.", text)]
    assert len(set(shown)) == 12
    assert min(shown) == 50
    assert max(shown) > 90
    assert "12 of 100 validation prompts" in text


def test_all_answers_of_the_teacher_to_a_prompt_are_shown_and_counted(run: Path):
    for stage in ("seqkd", "gad"):
        twice = [answer_row(0, f"{stage} says {number}.", style) for number, style in enumerate(("song", "none"))]
        twice[1]["teacher"] |= {"text": "taught otherwise"}
        write_answers(run, stage, [*twice, answer_row(1, "once", "song")])
    text = page(run).text
    assert "2 of 2 validation prompts" in text
    assert "taught 0" in text and "taught otherwise" in text
    assert "teacher, none: 0.3333" in text and "gad, none: 0.3333" in text


def test_long_answers_are_cut(run: Path):
    for stage in ("seqkd", "gad"):
        write_answers(run, stage, [answer_row(0, "y" * 50_000)])
    text = page(run).text
    assert "(42000 more characters)" in text
    assert re.findall("y{9,}", text) == ["y" * 8000] * 4  # two stages, two ways of decoding


def test_an_unfinished_run_has_a_page(tmp_path: Path):
    assert "nothing to show yet" in page(tmp_path).text
    with MetricsLog(tmp_path / "stages" / "seqkd", tmp_path / "tensorboard") as log:
        log.write(1, {"student/loss": 2.0})
    text = page(tmp_path).text
    assert "Stage seqkd" in text
    assert "Comparison" not in text


def test_no_run_and_broken_files_are_told(run: Path):
    with pytest.raises(UserError, match="no such run"):
        write_report(run / "other", [])
    (run / "evaluation" / "gad.jsonl").write_text("{")
    with pytest.raises(UserError, match="gad.jsonl"):
        page(run)
    (run / "evaluation" / "gad.jsonl").unlink()
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json"):
        page(run)


# --- charts ----------------------------------------------------------------------------------------------------------


def path_of(svg: str, which: int = 0) -> list[list[tuple[float, float]]]:
    """The points of a path, one list per unbroken piece."""
    commands = re.findall(r'<path[^>]* d="([^"]*)"', svg)[which]
    return [[tuple(map(float, point.split())) for point in piece.split("L")] for piece in commands.split("M")[1:]]  # type: ignore[misc]


def test_a_line_goes_from_corner_to_corner():
    svg = line_chart("t", "u", [Series("a", [1, 2, 3], [0, 5, 10], 1)]).svg
    ((first, middle, last),) = path_of(svg)
    assert first == (52, 196)
    assert last[0] == 470
    assert last[1] == pytest.approx(8 + (196 - 8) * 0.5 / 10.5, abs=0.1), "5 % of room above"
    assert middle == pytest.approx(((52 + 470) / 2, (196 + last[1]) / 2), abs=0.1)
    assert [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', svg)] == [0, 5, 10]


def test_nan_breaks_the_line_and_is_no_part_of_the_axis():
    chart = line_chart("t", "u", [Series("a", [1, 2, 3, 4], [1, math.nan, 2, math.inf], 1)])
    assert [len(piece) for piece in path_of(chart.svg)] == [1, 1]
    assert "nan" not in chart.svg
    assert chart.legend == (("a", 1, "2"),)
    assert line_chart("t", "u", [Series("a", [1], [math.nan], 1)]).legend[0][2] == "no finite value"


@pytest.mark.parametrize("values", [[0.0], [5.0], [-3.0, -3.0], [1e-9, 2e-9], [1e12, 1e12], [0.1, 0.1 + 1e-15]])
def test_flat_and_extreme_values_are_drawn_inside(values: list[float]):
    chart = line_chart("t", "u", [Series("a", list(range(len(values))), values, 1)], from_zero=False)
    for x, y in (point for piece in path_of(chart.svg) for point in piece):
        assert 52 <= x <= 470
        assert 8 <= y <= 196


def test_a_long_line_is_thinned_and_smoothed():
    ys = [float(i % 2) for i in range(10_000)]
    svg = line_chart("t", "u", [Series("a", list(range(10_000)), ys, 1)]).svg
    assert len(path_of(svg, 0)[0]) == len(path_of(svg, 1)[0]) <= 300
    assert len(svg) < 20_000


def test_labels_are_escaped():
    chart = line_chart("<i>", "<u>", [Series("<b>", [1, 2], [1, 2], 1)])
    assert "<b>" not in chart.svg
    assert "<i>" not in chart.svg


def test_panels_are_drawn_where_there_are_metrics():
    rows = [{"step": step, "discriminator/margin": 1.0, "student/entropy": 2.0} for step in range(3)]
    assert [chart.title for chart in stage_charts(rows)] == ["Margin", "Entropy"]
    assert len({panel.title for panel in PANELS}) == len(PANELS)


def test_win_rates_are_told_by_whom_they_are_against():
    assert meaning("wins_teacher").startswith("share of prompts on which the judge finds it better than the teacher's;")
    assert meaning("wins_seqkd").startswith("share of prompts on which the judge finds it better than seqkd;")
    assert meaning("new") == ""


@pytest.mark.parametrize(("loss", "told"), [("bradley_terry", "Bradley-Terry, nats"), ("cross_entropy", "cross entropy, nats")])
def test_the_discriminator_s_loss_is_named(run: Path, loss: str, told: str):
    with MetricsLog(run / "stages" / "gad", run / "tensorboard" / "gad") as log:
        log.write(1, {"discriminator/loss": 0.5})
    path = write_report(
        run,
        ["seqkd", "gad"],
        losses=make_config({"stages": {"gad": {"algorithm": "gad", "discriminator": {"loss": loss}}}}).discriminator_losses,
    )
    assert f"Discriminator's loss {told}" in Page(path.read_text(encoding="utf-8")).text


@pytest.mark.parametrize(("value", "text"), [(12345.0, "12.35k"), (0.30000000000000004, "0.3"), (0.0, "0"), (1234.5, "1234")])
def test_numbers(value: float, text: str):
    assert number(value) == text


# --- health and refreshing ---------------------------------------------------------------------------------------------


def test_health_is_told_and_a_run_under_way_reloads(tmp_path: Path):
    with MetricsLog(tmp_path / "stages" / "gad", tmp_path / "tensorboard") as log:
        for step in range(1, 30):
            held_out = {"validation/discriminator_accuracy": 0.5 if step < 20 else 0.7}
            log.write(step, {"student/reward_std": 1.0, "discriminator/accuracy": 0.7} | held_out)
    with MetricsLog(tmp_path / "stages" / "seqkd", tmp_path / "tensorboard2") as log:
        log.write(1, {"student/loss": 2.0})
    text = page(tmp_path).text
    assert "steps 1 to 19 : the discriminator is right on only 0.50" in text
    assert "stages.gad.discriminator.learning_rate" in text
    assert text.count("Nothing is wrong") == 1
    html = write_report(tmp_path, ["seqkd", "gad"], under_way="gad").read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh" content="30">' in html and "under way: gad" in Page(html).text
    assert "refresh" not in write_report(tmp_path, ["seqkd", "gad"]).read_text(encoding="utf-8")


def test_what_is_shown_of_a_run_is_brought_up_to_date_at_news_and_after_a_minute(monkeypatch: pytest.MonkeyPatch):
    clock, shown = [0.0], list[float]()
    monkeypatch.setattr("gadjax.train.time", SimpleNamespace(monotonic=lambda: clock[0]))
    page = _Page(lambda: shown.append(clock[0]))
    for clock[0], news in ((1.0, False), (2.0, True), (50.0, False), (63.0, False), (64.0, False)):
        page.show(news)
    assert shown == [2.0, 63.0]

"""Axes with round ticks, marks where their values are, text that stays text."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import speed_row

from arte_edge.publish.report.charts import (
    SHAPES,
    Axis,
    Plot,
    accuracy_chart,
    around,
    histogram_chart,
    length_chart,
    loss_chart,
    number,
    pareto_chart,
    questions_chart,
    time_chart,
    trace_of,
    traced,
)
from arte_edge.results.rows import Reading, SpeedRow

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in parsed(svg).iter(f"{SVG}text")]


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_inside_and_evenly_apart(low: float, span: float) -> None:
    axis = Axis("x", low, low + span)
    ticks = axis.ticks
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * max(span, abs(low))
    assert low - slack <= ticks[0] and ticks[-1] <= low + span + slack
    gaps = {round((b - a) / span, 4) for a, b in pairwise(ticks)}
    assert max(gaps) - min(gaps) < 1e-3


@given(st.floats(1e-3, 1e4), st.floats(1.2, 1e5))
def test_logarithmic_ticks_are_inside_and_more_than_one(low: float, factor: float) -> None:
    ticks = Axis("x", low, low * factor, log=True).ticks
    assert 2 <= len(ticks) <= 12
    assert all(low * 0.998 <= tick <= low * factor * 1.002 for tick in ticks)


@given(st.lists(finite, min_size=1, max_size=30))
def test_an_axis_around_values_holds_them_all(values: list[float]) -> None:
    axis = around("x", values)
    assert all(0 <= axis.share(value) <= 1 for value in values)


def test_an_axis_that_cannot_be_drawn_is_refused() -> None:
    for low, high in ((1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="axis"):
            Axis("x", low, high)
    with pytest.raises(ValueError, match="above zero"):
        Axis("x", 0, 1, log=True)


def test_numbers_are_short() -> None:
    found = [number(v) for v in (0, 0.25, 61.31, 154.2, 12345, -2.5, 1e-5)]
    assert found == ["0", "0.25", "61.3", "154", "12\u2009345", "\u22122.5", "0.00001"]


def test_a_chart_names_its_units_and_is_told_to_screen_readers() -> None:
    svg = Plot(Axis("seconds", 0, 10), Axis("°C", 20, 80), title="Warmth", desc="from 20 to 80").svg()
    root = parsed(svg)
    assert {"seconds", "°C"} <= set(texts(svg))
    named = root.attrib["aria-labelledby"].split()
    assert [e.text for e in root if e.attrib.get("id") in named] == ["Warmth", "from 20 to 80"]
    assert root.attrib["role"] == "img"


def test_a_mark_stands_where_its_value_is() -> None:
    plot = Plot(Axis("x", 0, 10), Axis("y", 0, 100), title="", desc="")
    assert plot.px(0) < plot.px(5) < plot.px(10)
    assert plot.px(5) == pytest.approx((plot.px(0) + plot.px(10)) / 2, abs=0.11)
    assert plot.py(100) < plot.py(0)  # up is less in SVG
    plot.mark(5, 50, tip="here")
    circle = next(parsed(plot.svg()).iter(f"{SVG}circle"))
    assert (float(circle.attrib["cx"]), float(circle.attrib["cy"])) == (plot.px(5), plot.py(50))


def test_every_series_has_a_shape_of_its_own() -> None:
    plot = Plot(Axis("x", 0, 10), Axis("y", 0, 10), title="", desc="")
    for series in range(len(SHAPES)):
        plot.mark(5, 5, series)
    drawn = re.findall(r'<g class="s\d">(.*?)</g>', plot.svg())
    assert len({re.sub(r"^<title>.*?</title>", "", body) for body in drawn}) == len(SHAPES) == 8


def test_text_of_models_is_escaped_everywhere() -> None:
    bad = "<script>alert(1)</script>&"
    plot = Plot(Axis(bad, 0, 1), [bad], title=bad, desc=bad, legend=[(bad, 0)])
    plot.mark(0.5, 0, tip=bad)
    plot.bar(0, 0.5, tip=bad)
    plot.rule(0.5, bad)
    assert "<script" not in plot.svg()
    assert bad in "".join(parsed(plot.svg()).itertext())


SCORES: list[dict[str, Any]] = [
    {"question": f"q{i // 4}", "technique": i % 4, "score": 0.5 + 0.01 * i, "text": "word " * (3 + 2 * i)}
    for i in range(24)
]
QUESTIONS = [{"id": f"q{i}", "input": f"question {i}?", "score": 0.5 + 0.04 * i} for i in range(6)]


def drawn(figure: Any) -> Any:
    return figure or pytest.fail("nothing was drawn")


def test_length_against_score_tells_the_correlation_and_means() -> None:
    figure = drawn(length_chart(SCORES))
    assert "r = +1.00" in figure.caption
    assert {"words in the rationale", "preference score", "mean of ten words"} <= set(texts(figure.svg))
    same = [{**row, "text": "one two"} for row in SCORES]
    assert "correlation undefined" in drawn(length_chart(same)).caption
    assert length_chart([{**row, "technique": -1} for row in SCORES]) is None  # answers without reasons


def test_the_means_of_bins_are_inside_the_axis() -> None:
    rows = [{**row, "text": "word " * n} for row, n in zip(SCORES, (8, 9, 15, 16, 41, 42), strict=False)]
    figure = drawn(length_chart(rows))
    plot_right = float(max(re.findall(r"M[\d.]+ [\d.]+V[\d.]+H([\d.]+)", figure.svg)))
    (line,) = re.findall(r'dashed"><polyline points="([^"]*)"', figure.svg)
    xs = [float(point.partition(",")[0]) for point in line.split()]
    assert len(xs) == 3 and xs[0] > 14 and max(xs) < plot_right


def test_a_question_row_is_drawn_for_each_and_the_best_stands_first() -> None:
    figure = drawn(questions_chart(SCORES, QUESTIONS))
    rows = [text for text in texts(figure.svg) if text.startswith("question")]
    assert rows == [f"question {i}?" for i in (5, 4, 3, 2, 1, 0)]
    many = [{**q, "id": f"q{i}", "input": f"question {i}?"} for i, q in enumerate(QUESTIONS * 5)]
    scores = [{**SCORES[0], "question": q["id"]} for q in many]
    assert "8 of 30" in drawn(questions_chart(scores, many)).caption


def test_a_histogram_counts_every_value() -> None:
    figure = drawn(histogram_chart([row["score"] for row in SCORES], "score", "rationales"))
    counts = [int(n) for n in re.findall(r"<title>(\d+) from", figure.svg)]
    assert sum(counts) == len(SCORES)
    assert histogram_chart([0.5] * 9, "score", "rationales") is not None  # all alike


def test_intervals_and_chance_are_drawn() -> None:
    row = {"label": "tuned", "accuracy": 0.31, "low": 0.23, "high": 0.41, "n": 100, "series": 4}
    assert {"tuned", "majority baseline", "accuracy, %"} <= set(texts(drawn(accuracy_chart([row], 0.16)).svg))


def test_the_front_marks_what_is_predicted() -> None:
    points = [
        {"file": f, "name": f, "decode": d, "predicted": p, "y": y, "low": y - 5, "high": y + 5}
        for f, d, p, y in (("a", 10.0, False, 50.0), ("b", 30.0, True, 45.0))
    ]
    figure = drawn(pareto_chart("pi", points, ["b", "a"], True))
    assert "predicted" in figure.caption
    assert {"b (predicted)", "decode, tokens/s (logarithmic)"} <= set(texts(figure.svg))
    assert figure.svg.count("hollow") == 1


def test_what_has_no_data_is_not_drawn() -> None:
    assert time_chart({}) is histogram_chart([1.0], "s", "w") is questions_chart([], []) is None
    assert length_chart([]) is loss_chart([], "loss", "loss", "tune") is accuracy_chart([], None) is None
    assert pareto_chart("pi", [], [], True) is None


def speed(**more: Any) -> SpeedRow:
    times = ((20.0, 21.0, 22.0), (23.0, 24.0, 25.0))
    return speed_row("tg3", 45.0, **{"itl_samples_ms": times} | more)


def test_a_trace_shows_every_token_and_the_temperature_if_there_is_one() -> None:
    readings = tuple(Reading(t_s=float(t), temperature_c=50.0 + t) for t in range(5))
    row = speed(readings=readings, throttled=True, throttle_reason="clock capped")
    _, tokens, sensors = trace_of(row)
    assert sensors is not None and "°C" in texts(sensors.svg)
    assert "ms a token" in texts(tokens.svg) and "throttled: clock capped" in tokens.caption
    lines = re.findall(r'<polyline points="([^"]*)"', tokens.svg)
    assert [len(line.split()) for line in lines] == [3, 3]
    assert trace_of(speed())[2] is None
    _, long, _ = trace_of(speed(itl_samples_ms=(tuple(20.0 + i % 3 for i in range(5000)),)))
    assert len(re.findall(r"[\d.]+,[\d.]+", long.svg)) < 500


def test_of_each_file_on_a_device_the_fastest_is_traced_and_failures_are_not() -> None:
    rows = [speed(), speed(median_ts=50.0, n_threads=2), speed(status="crashed"), speed(itl_samples_ms=())]
    rows.append(speed(median_ts=99.0, contended=True))
    assert traced([r for r in rows if r.n_threads]) == [rows[1]]

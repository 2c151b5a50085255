"""Charts are read as a person reads them, against the numbers beside their ticks, and must give the series back."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssl_global.explain.curves import HEALTH, LEARNING, MOST_POINTS, MOST_TICKS, Chart, charts, series, thinned


class Drawing(HTMLParser):
    """The SVG's paths by class, its texts by class with their places, and the words beside it."""

    def __init__(self, chart: Chart) -> None:
        super().__init__()
        self.paths: dict[str, list[str]] = {}
        self.texts: dict[str, list[tuple[float, float, str]]] = {"x": [], "y": []}
        self.words: list[str] = []
        self.label = ""
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.in_key = False
        self.html = chart.html()
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        self.open.append((tag, of))
        self.label = of.get("aria-label") or self.label
        self.in_key = self.in_key or tag == "ul"
        if tag == "path" and not self.in_key:
            self.paths.setdefault(of["class"], []).append(of["d"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        self.in_key = self.in_key and tag != "ul"

    def handle_data(self, data):
        tag, of = self.open[-1]
        if tag == "text":
            self.texts[of["class"]].append((float(of["x"]), float(of["y"]), data))
        else:
            self.words.append(data)

    def axis(self, name):
        """(places, values) of the ticks."""
        column = {"x": 0, "y": 1}[name]
        ticks = [(text[column], as_number(text[2])) for text in self.texts[name] if text[2] != "step"]
        return np.array(ticks).T

    def pieces(self, style):
        """Each unbroken piece of a line as [(step, value), ...], read off against the ticks."""
        (steps_at, steps), (values_at, values) = self.axis("x"), self.axis("y")
        to_step, to_value = np.polyfit(steps_at, steps, 1), np.polyfit(values_at, values, 1)
        found = []
        for piece in "".join(self.paths[style]).split("M")[1:]:
            points = [tuple(map(float, point.removesuffix("h0").split())) for point in piece.split("L")]
            found.append([(np.polyval(to_step, x), np.polyval(to_value, y)) for x, y in points])
        return found

    def frame(self):
        """Left, right, top and bottom of the place where lines are drawn: the axis below, and the highest grid line."""
        left, bottom, right = map(float, re.match(r"M([\d.]+) ([\d.]+)H([\d.]+)", self.paths["axis"][0]).groups())
        grid = [float(at) for at in re.findall(r"M[\d.]+ ([\d.]+)H", self.paths["grid"][0])]
        assert sorted(grid) == sorted(y for _, y, text in self.texts["y"] if text != "step")
        assert max(grid) == bottom
        return left, right, min(grid), bottom

    def unit(self):
        """Steps and values of a whole unit of the drawing."""
        (steps_at, steps), (values_at, values) = self.axis("x"), self.axis("y")
        return abs(np.polyfit(steps_at, steps, 1)[0]), abs(np.polyfit(values_at, values, 1)[0])


def as_number(text):
    scale = {"k": 1e3, "M": 1e6}.get(text[-1], 1)
    return float(text.rstrip("kM")) * scale


def agree(drawing, style, expected):
    """The pieces are those, to what a tenth of a unit and the rounding of the axes can tell."""
    left, right, top, bottom = drawing.frame()
    assert drawing.texts["x"][0] == (left, pytest.approx(bottom, abs=20), "0")
    for x, y in re.findall(r"([\d.]+) ([\d.]+)", "".join(drawing.paths[style])):
        assert left <= float(x) <= right
        assert top <= float(y) <= bottom
    pieces = drawing.pieces(style)
    assert [len(piece) for piece in pieces] == [len(piece) for piece in expected]
    step, value = drawing.unit()
    for piece, points in zip(pieces, expected, strict=True):
        np.testing.assert_allclose(np.array(piece)[:, 0], np.array(points)[:, 0], atol=0.3 * step)
        np.testing.assert_allclose(np.array(piece)[:, 1], np.array(points)[:, 1], atol=0.3 * value)


LOSSES = [(1, 6.34), (20, 6.22), (40, 5.26), (60, 4.36), (80, 3.76), (375, 2.97)]


def test_a_line_read_off_against_its_ticks_is_the_series():
    drawing = Drawing(Chart("Loss", {"loss": LOSSES}))
    agree(drawing, "line-1", [LOSSES])
    assert drawing.words[0] == "Loss"
    assert drawing.words[1] == "2.97 at step 375, range 2.97 to 6.34"
    assert "2.97 at step 375" in drawing.label


def test_points_come_in_the_order_of_steps():
    agree(Drawing(Chart("Loss", {"loss": LOSSES[::-1]})), "line-1", [LOSSES])


@pytest.mark.parametrize("scale", [1e-9, 3e-5, 0.02, 1.0, 700.0, 4e5, 2e12, -1e-3, -50.0])
def test_any_size_of_numbers_is_read_off_rightly(scale):
    points = [(step, value * scale) for step, value in LOSSES]
    agree(Drawing(Chart("Loss", {"loss": points})), "line-1", [points])


@pytest.mark.parametrize("last", [1, 7, 99, 12_345, 250_000, 3_000_000, 10**12])
def test_any_number_of_steps_is_read_off_rightly(last):
    points = [(0, 1.0), (last // 2, 3.0), (last, 2.0)]
    agree(Drawing(Chart("Loss", {"loss": points})), "line-1", [points])


@given(
    st.lists(st.floats(-1e9, 1e9, width=32), min_size=2, max_size=30),
    st.integers(1, 10**6),
)
@example([0.8000, 0.8010], 1)
@example([1e6, 1e6 + 0.1], 1)
@example([-3.0, 3.0], 1)
def test_ticks_are_few_round_and_around_all_values(values, gap):
    drawing = Drawing(Chart("x", {"x": list(enumerate(values))}))
    _, ticks = drawing.axis("y")
    assert 2 <= len(ticks) <= MOST_TICKS + 2
    gaps = np.diff(ticks)
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-3)  # no two have the same text
    mantissa = gaps[0] / 10.0 ** math.floor(math.log10(gaps[0]) + 1e-4)
    assert min(abs(mantissa - whole) for whole in (1, 2, 5)) < 2e-3
    tolerance = 1e-6 * gaps[0]
    assert ticks[0] - tolerance <= min(values) <= max(values) <= ticks[-1] + tolerance


def test_values_that_are_not_finite_are_gaps_and_are_counted():
    nan, inf = math.nan, math.inf
    points = [(1, 1.0), (2, 2.0), (3, nan), (4, 3.0), (5, inf), (6, -inf), (7, 4.0), (8, 1.5), (9, nan)]
    drawing = Drawing(Chart("x", {"x": points}))
    agree(drawing, "line-1", [[(1, 1.0), (2, 2.0)], [(4, 3.0)], [(7, 4.0), (8, 1.5)]])
    assert drawing.paths["line-1"][0].count("h0") == 1  # the lone point is seen: a line of no length with round ends
    assert drawing.words[1] == "1.5 at step 8, range 1 to 4; 4 of 9 values not finite"


def test_one_point_is_a_dot():
    drawing = Drawing(Chart("x", {"x": [(938, 0.7)]}))
    agree(drawing, "line-1", [[(938, 0.7)]])
    agree(drawing, "line-1 dots", [[(938, 0.7)]])
    assert drawing.words[1] == "0.7 at step 938"


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-12, 1e12])
def test_a_constant_line_is_level_and_inside(value):
    points = [(step, value) for step in (1, 2, 3)]
    drawing = Drawing(Chart("x", {"x": points}))
    agree(drawing, "line-1", [points])
    _, ticks = drawing.axis("y")
    assert ticks[0] < value < ticks[-1]
    assert "range" not in drawing.words[1]


def test_nothing_is_no_chart_and_nothing_finite_is_words():
    assert Chart("x", {}).html() == ""
    assert Chart("x", {"x": []}).html() == ""
    said = Chart("x", {"x": [(1, math.nan), (2, math.nan)]}).html()
    assert "2 of 2 values not finite" in said
    assert "viewBox" not in said


def test_baselines_are_levels_with_their_words():
    chart = Chart("k-NN", {"k-NN": [(94, 0.61), (375, 0.65)]}, {"untrained": 0.5, "pixels": 0.26, "odd": math.nan})
    drawing = Drawing(chart)
    (places, values) = drawing.axis("y")
    for style, level in (("level-1", 0.5), ("level-2", 0.26)):
        (found,) = drawing.paths[style]
        y = float(re.fullmatch(r"M[\d.]+ ([\d.]+)H[\d.]+", found)[1])
        assert y == pytest.approx(np.interp(level, values, places), abs=0.1)
    assert "level-3" not in drawing.paths
    assert drawing.words[1:] == ["k-NN 0.65 at step 375, range 0.61 to 0.65", "untrained 0.5", "pixels 0.26"]


def test_lines_that_share_a_chart_have_classes_of_their_own():
    drawing = Drawing(Chart("x", {"a": [(1, 1.0), (9, 2.0)], "b": [(1, 4.0), (9, 3.0)]}))
    agree(drawing, "line-1", [[(1, 1.0), (9, 2.0)]])
    agree(drawing, "line-2", [[(1, 4.0), (9, 3.0)]])
    assert 'class="line-1"' in drawing.html.split("a 2 at step 9")[0]
    assert 'class="line-2"' in drawing.html.split("a 2 at step 9")[1].split("b 3 at step 9")[0]


def test_names_are_texts():
    evil = '"><script>alert(1)</script>'
    drawing = Drawing(Chart(evil, {evil: [(1, 1.0)]}, {evil + "2": 2.0}))
    assert "<script" not in drawing.html
    assert drawing.words[0] == evil
    assert drawing.label.startswith(evil)


# ------------------------------------------------------------------------------------------------------------ thinning


def test_a_million_points_are_few_and_their_peaks_are_kept():
    random = np.random.default_rng(0)
    values = random.normal(size=1_000_000)
    values[[123_456, 777_777]] = [90.0, -70.0]
    values[5] = math.nan
    drawing = Drawing(Chart("x", {"x": list(zip(range(1_000_000), values.tolist(), strict=True))}))
    assert len(drawing.html) < 20_000
    points = np.array([point for piece in drawing.pieces("line-1") for point in piece])
    assert len(points) <= MOST_POINTS
    step, value = drawing.unit()
    for at, peak in ((123_456, points[:, 1].argmax()), (777_777, points[:, 1].argmin())):
        np.testing.assert_allclose(points[peak], [at, values[at]], atol=max(0.3 * step, 0.3 * value))
    assert drawing.words[1].endswith("range -70 to 90; 1 of 1\u202f000\u202f000 values not finite")


def test_thinning_keeps_first_lowest_highest_and_last_of_each_column():
    random = np.random.default_rng(1)
    steps = np.sort(random.choice(10_000, size=3000, replace=False)).astype(float)
    values = random.normal(size=3000)
    values[random.random(3000) < 0.1] = math.nan
    values[(steps > 4000) & (steps < 4500)] = math.nan
    found_steps, found = thinned(steps, values)
    edges = np.linspace(steps[0], steps[-1], 101)
    for low, high in pairwise(edges):  # the slow way, column by column
        inside = (steps >= low) & ((steps < high) | (high == edges[-1]))
        kept = found[(found_steps >= low) & ((found_steps < high) | (high == edges[-1]))]
        finite = values[inside][np.isfinite(values[inside])]
        if not len(finite):
            assert np.isnan(kept).all()
            continue
        assert {kept[0], kept[-1], kept.min(), kept.max()} == {finite[0], finite[-1], finite.min(), finite.max()}
        assert len(kept) <= 4
    assert np.isnan(found[(found_steps > 4100) & (found_steps < 4400)]).all()
    assert (np.diff(found_steps) >= 0).all()


def test_few_points_are_all_kept():
    steps, values = np.arange(400.0), np.arange(400.0)
    assert len(thinned(steps, values)[0]) == 400


# ------------------------------------------------------------------------------------------------------------- metrics


def test_series_are_what_is_a_number_at_a_step():
    lines = [
        {"step": 1, "loss": 2.0, "lr": 0},
        {"step": 3, "loss": math.nan, "knn": True},
        {"step": 2, "loss": 1.5, "knn": "0.5", "unknown": 4.0},
        {"step": 2, "loss": 1.25},
        {"step": "4", "loss": 1.0},
        {"step": True, "loss": 1.0},
        {"step": -1, "loss": 1.0},
        {"step": 10**400, "loss": 1.0},
        {"step": 5, "loss": 10**400},
        {"loss": 1.0},
    ]
    found = series(lines)
    assert found.keys() == {"loss", "lr"}
    assert found["lr"] == [(1, 0)]
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 5]
    np.testing.assert_array_equal([value for _, value in found["loss"]], [2.0, 1.25, math.nan, math.nan])


def test_a_run_gets_the_charts_it_has_values_for():
    metrics = {"loss": LOSSES, "knn": [(94, 0.6)], "top1": []}
    baselines = {"knn_untrained": 0.5, "knn_pixels": None, "linear_untrained": "0.5"}
    found = charts((*LEARNING, *HEALTH), metrics, baselines)
    assert [list(chart.lines) for chart in found] == [["loss"], ["k-NN"]]
    assert found[1].baselines == {"k-NN, untrained": 0.5}
    assert charts(LEARNING, {}, baselines) == []

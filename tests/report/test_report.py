import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from etils.epath import backend

import object_store
from pref_jax.report import (
    Card,
    Column,
    Comparison,
    Comparisons,
    Config,
    Curves,
    Estimate,
    Histogram,
    NotRun,
    Panel,
    Report,
    Response,
    Sample,
    Samples,
    Series,
    Table,
    Text,
    TokenMap,
    TokenMaps,
    TokenSample,
    from_json,
    read_metrics,
    to_json,
    write_report,
)
from pref_jax.report.__main__ import main
from pref_jax.report.plots import draw

HOSTILE = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "link", "line", "path", "use", "rect", "input"}


class Page(html.parser.HTMLParser):
    """The elements of a page, and a record of every tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def make_report():
    steps = np.arange(1, 41)
    loss = np.exp(-steps / 10.0)
    loss[7] = math.nan
    panels = (
        Panel("Loss", "step", "nats", (Series("DPO", steps, loss),), log_y=True),
        Panel(
            "Accuracy",
            "step",
            "share",
            (
                Series("DPO", [1, 2, 3], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.6] * 3),
                Series(HOSTILE, [1, 2], [0.5, 0.5]),
            ),
        ),
    )
    table = Table(
        "Results",
        (Column("stage"), Column("accuracy", 1, percent=True), Column("KL", 3, "nats")),
        (
            ("base", Estimate(0.5, 0.45, 0.55), None),
            ("DPO", Estimate(0.871, 0.85, 0.89), -0.25),
            ("IPO", NotRun("no time"), 3),
        ),
        note="Means with 95 % intervals.",
        footnotes={"KL": "On the policy's own responses.", "IPO": "See the appendix."},
    )
    samples = Samples(
        "Responses",
        ("base", "DPO"),
        (Sample(HOSTILE, (Response("", "0.1", False), Response(HOSTILE, right=True))),),
    )
    counts = {"DPO": np.array([3, 5]), "base": np.array([6, 2])}
    return Report(
        "Quickstart",
        "SFT, then DPO",
        HOSTILE,
        (Card("win rate", Estimate(0.7, 0.68, 0.72), "ties one half", 1, "", True),),
        (
            Text("What was run", ("One paragraph.", HOSTILE)),
            table,
            Curves("Training", panels, note="Every step."),
            Comparisons(
                "Win mass",
                (
                    Comparison(
                        HOSTILE,
                        HOSTILE,
                        {
                            HOSTILE: Estimate(0.3, 0.25, 0.35),
                            "DPO": Estimate(0.28, 0.2, 0.36),
                        },
                        marked=0.125,
                    ),
                ),
                note=HOSTILE,
            ),
            Histogram("Margins", "margin, nats", "pairs", [-1.0, 0.0, 1.0], counts),
            samples,
            Config("Settings", {"seed": 0, "dpo": {"beta": 0.1, "name": HOSTILE}}),
        ),
        {"command": "python -m x", "versions": {"jax": "0.10"}, "duration": 3723.4},
    )


@pytest.fixture(scope="module")
def page_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(make_report(), path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(page_text):
    return Page(page_text)


def write_table(tmp_path, column, *values):
    """What the cells of one column say, as (text, line below)."""
    rows = tuple((f"row {i}", value) for i, value in enumerate(values))
    table = Table("t", (Column("name"), column), rows)
    write_report(Report("r", sections=(table,)), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    return [tuple(re.sub("<[^>]+>", "|", c).strip("|").split(" |")) for c in cells]


def test_a_report_survives_the_trip_through_strict_json():
    report = make_report()
    record = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert from_json(record) == report
    assert to_json(from_json(record)) == to_json(report)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "NaN", 1, 1.0, True])
def test_numbers_keep_their_kind_and_value_in_json(value):
    card = Card("label", value)
    back = from_json(json.loads(json.dumps(to_json(card), allow_nan=False))).value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_arrays_and_lists_become_plain_values():
    series = Series("a", np.arange(2), [np.float32(0.5), 1])
    assert series.x == (0, 1) and type(series.x[0]) is int
    assert series.y == (0.5, 1) and type(series.y[0]) is float
    assert Config("c", {"betas": [0.9, 0.95]}).values == {"betas": (0.9, 0.95)}


def test_a_run_folder_is_enough_to_make_the_page_again(tmp_path, page_text):
    record = {"numbers": 1, "report": to_json(make_report())}
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    command = [sys.executable, "-m", "pref_jax.report", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page_text


def test_a_run_in_a_bucket_is_read_and_gets_its_page(page_text, monkeypatch):
    bucket = object_store.install(monkeypatch)
    folder = epath.Path("gs://bucket/runs/001")
    record = {"numbers": 1, "report": to_json(make_report())}
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.75}\n')
    steps, values = read_metrics(folder / "metrics.jsonl")["loss"]
    assert (steps.tolist(), values.tolist()) == ([1], [0.75])
    monkeypatch.setattr(sys, "argv", ["report", "gs://bucket/runs/001"])
    main()
    assert (folder / "report.html").read_bytes().decode() == page_text
    assert bucket.puts[-1] == "/bucket/runs/001/report.html"


def test_a_missing_package_of_a_bucket_is_named(monkeypatch, capsys):
    def missing(path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(backend.fsspec_backend, "fs", missing)
    monkeypatch.setattr(sys, "argv", ["report", "gs://bucket/runs/001"])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert "gs://bucket/runs/001 cannot be read: Please install gcsfs" in error


def test_a_run_without_a_report_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "needs a record.json" in capsys.readouterr().err
    (tmp_path / "record.json").write_text('{"loss": 1}')
    with pytest.raises(SystemExit):
        main()
    assert "needs the key \"report\"; it has ['loss']" in capsys.readouterr().err


def test_no_request_leaves_the_page(page, page_text):
    for tag, attrs in page.elements:
        assert tag not in {"script", "img", "iframe", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            target = attrs.get(name) or "#"
            assert target.startswith("#") or target == "data:,", (tag, name, target)
    for target in re.findall(r"url\(([^)]*)\)", page_text):
        assert target.startswith("#")
    assert "@import" not in page_text and "@font-face" not in page_text
    assert "http:" not in page_text and "https:" not in page_text
    policy = [m for m in page.all("meta") if "http-equiv" in m]
    assert policy[0]["content"].startswith("default-src 'none';")


def test_data_is_escaped_everywhere(page, page_text):
    assert "<script" not in page_text
    # Summary, paragraph, legend, prompt, response, setting; of a comparison title,
    # quantity, name and note; and two spoken labels.
    assert "".join(page.texts).count(HOSTILE) == 10
    assert sum(HOSTILE in svg.get("aria-label", "") for svg in page.all("svg")) == 2


def test_local_targets_exist_and_ids_are_unique(page, page_text):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page_text)
    assert len(targets) > 6
    assert {a or b for a, b in targets} <= set(ids)


def test_the_page_can_be_heard(page):
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert len(page.all("caption")) == len(page.all("table")) == 1
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    plots = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(plots) == 4
    assert all(s["role"] == "img" and s["aria-label"] for s in plots)


@pytest.mark.parametrize("num_sections", [4, 5])
def test_contents_are_listed_from_five_sections_on(tmp_path, num_sections):
    sections = tuple(Text(f"title {i}", ("text",)) for i in range(num_sections))
    write_report(Report("r", sections=sections), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    links = [attrs["href"] for attrs in page.all("a")]
    assert links == ([f"#section-{i}" for i in range(1, 6)] if num_sections > 4 else [])


def test_numbers_are_shown_with_their_digits_and_intervals(tmp_path):
    cells = (1234.5, 7, Estimate(-0.004, -1.0, 2), "word", None, NotRun("no time"))
    assert write_table(tmp_path, Column("c", 2), *cells) == [
        ("1,234.50",),
        ("7",),
        ("0.00", "[−1.00, 2.00]"),
        ("word",),
        ("–",),
        ("not run", "no time"),
    ]
    percent = write_table(tmp_path, Column("c", 1, percent=True), 0.123, 1, True)
    assert percent == [("12.3",), ("100.0",), ("yes",)]
    odd = (math.nan, -math.inf, True, 0.0, -3, -1e-7, Estimate(1e-5, 0, 2e-5))
    assert write_table(tmp_path, Column("c", 1), *odd) == [
        ("NaN",),
        ("−∞",),
        ("yes",),
        ("0.0",),
        ("−3",),
        ("−1.0e−07",),
        ("1.0e−05", "[0.0e+00, 2.0e−05]"),
    ]


def test_units_cards_footnotes_and_facts_are_shown(page):
    text = " ".join("".join(page.texts).split())
    for part in (
        "accuracy (%)",
        "KL1 (nats)",
        "IPO2",
        "70.0 %[68.0, 72.0]",
        "✗ wrong, 0.1",
        "✓ right",
        "empty",
        "jax 0.10",
        "1 h 2 min 3 s",
    ):
        assert part in text, part


def test_points_that_cannot_be_drawn_are_counted(tmp_path):
    y = [1.0, math.nan, 0.0, 2.0]
    x = [0, 1, 2, 3]
    panels = tuple(
        Panel(title, "x", "y", (Series("a", x, y), Series("b", [], [])), **axes)
        for title, axes in {"plain": {}, "log": {"log_x": True, "log_y": True}}.items()
    )
    write_report(Report("r", sections=(Curves("c", panels),)), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "“plain”: 1 of 4 points of a, not finite.<" in text
    assert "“log”: 3 of 4 points of a, not finite, or not positive" in text
    assert text.count("b, which has no points") == 2


def test_a_point_between_gaps_is_marked():
    line = Series("a", list(range(60)), [0.5] * 20 + [math.nan, 1.0] * 20)

    def num_marks(line):
        panel = Panel("p", "x", "y", (line,))
        return draw(panel, {"a": (0, ())}, "p", label="").count("<use ")

    assert num_marks(line) == 20
    assert num_marks(Series("a", line.x, [0.5] * 60)) == 0
    assert num_marks(Series("a", line.x[:9], line.y[:9])) == 9


@pytest.mark.parametrize("decades, ticks", [(2, {"2", "50"}), (7, {"1e-05"})])
def test_logarithmic_axes_carry_plain_numbers(decades, ticks):
    line = Series("a", [1, 2], [10.0 ** (2 - decades), 100.0])
    panel = Panel("p", "x", "y", (line,), log_y=True)
    drawing = draw(panel, {"a": (0, ())}, "p", label="")
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    assert ticks <= set(labels) and len(set(labels)) < 20
    assert not any("$" in label for label in labels)


def test_bands_and_dashes_are_drawn():
    line = Series("a", [1, 2], [1, 2], low=[0, 1], high=[2, 3])
    for kind in (
        Panel("p", "x", "y", (line,)),
        Histogram("h", "x", "y", [0, 1], {"a": [3]}),
    ):
        drawing = draw(kind, {"a": (4, (5, 2))}, "p", label="")
        assert re.search(r"fill: var\(--series-4\); [\w-]*opacity: 0.18", drawing)
        assert "stroke-dasharray: " in drawing


def test_estimates_stand_below_each_other_with_their_intervals(tmp_path):
    estimates = {
        "first": Estimate(0.5, 0.25, 0.75),
        "lost": Estimate(math.nan, math.nan, math.nan),
        "last & least": Estimate(0.1, 0.05, 0.2),
    }
    panel = Comparison("scenario", "win mass", estimates, marked=0.125)
    drawing = draw(panel, {}, "x", label="l")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    assert [text for text in texts if not text[0].isdigit()] == [
        "first",
        "last &amp; least",
    ]
    y = [
        float(x)
        for x in re.findall(r'<use href="#[^"]*" x="[^"]*" y="([^"]*)"', drawing)
    ]
    assert "stroke-dasharray" in drawing  # what they are compared with
    plain = draw(dataclasses.replace(panel, marked=None), {}, "x", label="l")
    assert drawing.count("stroke-dasharray") > plain.count("stroke-dasharray")
    assert y == sorted(y) and len(y) >= 2  # the first name is at the top
    report = Report("t", sections=(Comparisons("c", (panel,)),))
    write_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Not drawn in “scenario”: lost, not finite." in page
    assert "first: 0.500 [0.250, 0.750]." in page  # for readers who hear the page


def test_names_beyond_the_colours_get_dashes(tmp_path):
    lines = tuple(Series(f"m{i}", [1, 2], [i, i]) for i in range(7))
    curves = Curves("c", (Panel("p", "x", "y", lines),))
    write_report(Report("r", sections=(curves,)), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    pens = re.findall(r'--series-(\d)\)" stroke-dasharray="([^"]*)"', text)
    assert len(set(pens)) == 7 and pens[6] == ("0", "5 2")


def test_one_name_has_one_colour_in_the_whole_page(page_text):
    legends = re.findall(r"--series-(\d)\).*?</svg>(.*?)</li>", page_text)
    names = {}
    for colour, name in legends:
        names.setdefault(name, set()).add(colour)
    assert len(legends) == 4 and len(names) == 3
    assert all(len(colours) == 1 for colours in names.values())
    assert not re.search("#00fe", page_text)
    style = re.search("<style>(.*?)</style>", page_text, re.S).group(1)
    for name in set(re.findall(r"var\((--[\w-]+)\)", page_text)):
        is_font = name in ("--serif", "--sans", "--mono")
        assert style.count(f"{name}:") == (1 if is_font else 2), name  # light and dark


def test_the_same_report_gives_the_same_bytes(tmp_path, page_text):
    write_report(make_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page_text


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Estimate(0.5, 0.6, 0.4), ValueError, "low <= high; got [0.6, 0.4]"),
        (
            lambda: Table("t", (Column("a"), Column("b")), (("x", 1), ("y",))),
            ValueError,
            "`Table.rows[1]` needs 2 entries, as many as `columns`; got 1",
        ),
        (
            lambda: Table("t", (Column("a"),), (("x",),), footnotes={"z": "?"}),
            ValueError,
            "rows, of ['a', 'x']; got 'z'",
        ),
        (lambda: Series("a", [1, 2], [1]), ValueError, "`Series.y of 'a'` needs 2"),
        (
            lambda: Series("a", [1], [1], low=[1]),
            ValueError,
            "`Series.high of 'a'` needs 1",
        ),
        (
            lambda: Histogram("h", "x", "y", [0, 1, 2], {"a": [1]}),
            ValueError,
            "`Histogram.counts['a']` needs 2",
        ),
        (
            lambda: Samples("s", ("a", "b"), (Sample("p", (Response("r"),)),)),
            ValueError,
            "`Samples.rows[0].responses` needs 2",
        ),
        (lambda: Text("t", "one string"), TypeError, "needs tuple[str, ...]; got 'one"),
        (lambda: Report("r", sections=("text",)), TypeError, "`Report.sections` needs"),
        (lambda: Card("c", {"a": 1}), TypeError, "`Card.value` needs Cell"),
        (
            lambda: Config("c", {"a": {"b": print}}),
            TypeError,
            "values['a']['b']` needs",
        ),
        (lambda: Config("c", {1: 2}), TypeError, "needs strings as keys"),
        (lambda: from_json({"$type": "Chart"}), ValueError, "got 'Chart'"),
        (
            lambda: from_json({"$type": "Text", "colour": 1}),
            TypeError,
            "unexpected keyword argument 'colour'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def write_lines(tmp_path, *lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_metrics_become_curves(tmp_path):
    path = write_lines(
        tmp_path,
        '{"step": 1, "loss": 0.75, "time/step": 2}',
        '{"step": 2, "loss": "NaN", "rewards/margin": "-Infinity"}',
        '{"step": 3, "loss": "Infinity"}',
    )
    metrics = read_metrics(path)
    assert list(metrics) == ["loss", "time/step", "rewards/margin"]
    steps, values = metrics["loss"]
    assert steps.dtype == np.int64 and values.dtype == np.float64
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [0.75, np.nan, np.inf])
    np.testing.assert_array_equal(metrics["rewards/margin"], [[2], [-np.inf]])


def test_the_later_line_of_a_resumed_run_counts_and_the_log_says_so(tmp_path, caplog):
    lines = [f'{{"step": {s}, "loss": {v}}}' for s, v in ((1, 9), (3, 8), (2, 7))]
    path = write_lines(tmp_path, *lines, '{"step": 3, "loss": 6}')
    steps, values = read_metrics(path)["loss"]
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [9, 7, 6])
    assert "1 values were written again" in caplog.text


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"step": 2, "lo', "needs one JSON object"),
        ("", "needs one JSON object"),
        ("[1]", 'an object with an integer "step"'),
        ('{"loss": 1.0}', 'an object with an integer "step"'),
        ('{"step": 1.5}', 'an object with an integer "step"'),
        ('{"step": true}', 'an object with an integer "step"'),
        ('{"step": 2, "loss": NaN}', 'a bare NaN, which JSON lacks; write "NaN"'),
        ('{"step": 2, "loss": "nan"}', "'loss' needs a number"),
        ('{"step": 2, "loss": null}', "'loss' needs a number"),
        ('{"step": 2, "loss": true}', "'loss' needs a number"),
    ],
)
def test_a_broken_line_is_refused_with_file_and_line(tmp_path, line, message):
    path = write_lines(tmp_path, '{"step": 1, "loss": 1.0}', line)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_metrics(path)
    assert f"{path}, line 2: " in str(error.value)


# --- token maps -----------------------------------------------------------------------


def token_maps(**changes):
    shown = TokenMap(("a", HOSTILE), {"Q": (1.0, -4.0), "V": (math.nan, 0.0)}, (1,))
    settings = {
        "title": "Tokens",
        "columns": ("policy", "reference"),
        "quantities": {"Q": "a logit", "V": "a log-sum-exp"},
        "rows": (TokenSample(HOSTILE, "row 0", (shown, shown)),),
    }
    return TokenMaps(**settings | changes)


def test_token_maps_survive_json():
    report = Report("Page", sections=(token_maps(),))
    assert from_json(json.loads(json.dumps(to_json(report)))) == report


def test_a_token_has_a_colour_for_each_finite_number(tmp_path):
    write_report(Report("Page", sections=(token_maps(),)), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    tokens = [a for tag, a in page.elements if a.get("class", "").startswith("token")]
    assert [t["style"] for t in tokens[:2]] == [
        "--q0:rgb(15 98 196/0.19)",  # V has no colour: its only finite number is 0
        "--q0:rgb(220 106 12/0.75)",
    ]
    assert [t["data-values"] for t in tokens[:2]] == [
        "Q 1.000\nV \u2013",
        "Q \u22124.000\nV 0.000",
    ]
    assert [t["class"] for t in tokens] == ["token", "token marked"] * 2
    chosen = [a for tag, a in page.elements if a.get("type") == "radio"]
    assert ["checked" in a for a in chosen] == [True, False]
    assert not any(tag == "script" for tag, _ in page.elements)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenMap(("a",), {"Q": (1.0, 2.0)}), "TokenMap.values['Q']"),
        (lambda: token_maps(columns=("policy",)), "TokenMaps.rows[0].maps"),
        (lambda: token_maps(quantities={"Q": "a logit"}), "got ['V'] too"),
    ],
)
def test_token_maps_that_do_not_agree_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()

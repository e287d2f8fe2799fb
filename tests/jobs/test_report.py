"""The page of a run: one file, well-formed, with everything in it, and never a reason for a run to fail."""

import math
import re
from html.parser import HTMLParser

import pytest

from jobs import pretrain, report
from jobs.chart import MOST, chart, thin
from jobs.record import read

VOID = {"meta", "link", "br", "hr", "img", "input"}
LOOSE = {"tr", "td"}  # HTML closes them by itself


class Page(HTMLParser):
    """Tags in order, the text inside each, and what the page asks other places for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.outside, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outside += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID | LOOSE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def inside(self, tag: str) -> list[str]:
        return [data for opened, data in self.texts if opened and opened[-1] == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDIFICE_HOME", str(tmp_path_factory.mktemp("home")))
        options = "tiny --workers 0 --steps 6 --batch 4 --length 48 --eval_every 3 --data.vocab 300".split()
        pretrain.main([*options, "--model.vocab", "512"])
        yield pretrain.run_folder("tiny")


def test_a_finished_run_has_a_page_that_needs_nothing_else(run):
    text = (run / report.FILE).read_text()
    page = Page(text)
    assert text.startswith("<!doctype html>") and page.tags.count("html") == page.tags.count("body") == 1
    assert page.outside == ["data:,"] and not re.search(r"https?://|url\(|@import|<script", text)
    captions = " ".join(page.inside("figcaption"))
    for title in ("loss (nats)", "bits per byte", "gradient norm", "tokens per second", "learning rate"):
        assert title in captions
    assert page.tags.count("svg") >= 5 and page.inside("h1") == ["tiny"]
    assert "6 / 6" in page.inside("b")
    losses = [record["val_loss"] for record in read(run) if "val_loss" in record]
    assert f"{losses[0]:.3f} \u2192 {losses[-1]:.3f}" in page.inside("b")
    assert any('"optim"' in data for data in page.inside("pre")), "the job is on the page"
    environment = dict(zip(page.inside("table")[::2], page.inside("table")[1::2], strict=False))
    assert environment["torch"] and environment["workers of the last checkpoint"] == "1"


def test_the_model_writes_on_from_held_out_text_the_same_every_time(run):
    def samples() -> list[str]:
        page = Page((run / report.FILE).read_text())
        assert len([data for data in page.inside("mark") if data.strip()]) >= 1
        return [data for opened, data in page.texts if "pre" in opened and '"optim"' not in data]

    before = samples()
    report.main(["tiny"])
    assert samples() == before
    report.main([str(run), "--samples", "0"])
    assert "What it writes" not in (run / report.FILE).read_text()


def test_what_a_model_writes_is_text_and_not_html():
    job = {"model": {"model": "decoder"}, "steps": 1, "name": "</pre><script>"}
    evil = "<script>alert(1)</script> & <b>"
    text = report.page("<i>", job, [{"step": 1, "loss": 1.0, "a<b": 2.0}], [(evil, evil)], {"<x>": "<y>"})
    page = Page(text)
    assert not {"script", "i", "x", "y"} & set(page.tags)
    assert "".join(page.inside("mark")) == evil and "a<b" in "".join(page.inside("figcaption"))


def test_other_families_have_their_own_measures():
    records = [{"step": 0, "val_loss": 2.0, "val_accuracy": 0.1}]
    records += [
        {"step": n, "loss": 2 / n, "accuracy": 0.1 * n, "grad_norm": 1.0, "critic.loss": -n} for n in range(1, 5)
    ]
    text = report.page("x", {"model": {"model": "vit"}, "steps": 4}, records, [], {})
    captions = "".join(Page(text).inside("figcaption"))
    assert "accuracy" in captions and "critic.loss" in captions and "tokens per second" not in captions


def test_an_empty_run_has_a_page():
    assert Page(report.page("x", {"model": {"model": "vit"}, "steps": 4}, [], [], {})).inside("b")[0] == "0 / 4"


def test_a_page_that_cannot_be_written_does_not_fail_the_run(run, monkeypatch, capsys):
    def breaks(*_, **__):
        raise RuntimeError("disk is\nfull")

    monkeypatch.setattr(report, "write", breaks)
    options = "tiny --workers 0 --steps 8 --batch 4 --length 48 --eval_every 3 --data.vocab 300".split()
    pretrain.main([*options, "--model.vocab", "512"])
    said = capsys.readouterr()
    assert "no report.html: RuntimeError: disk is full" in said.err and "run tiny: 8/8 steps" in said.out


def test_a_large_model_does_not_write_at_the_end_of_its_job(run, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "write", lambda run, samples: asked.append(samples))
    report.after(run)
    monkeypatch.setattr(report, "LARGE", 10)
    report.after(run)
    assert asked == [3, 0]


def test_no_run_is_one_line(run, capsys):
    with pytest.raises(SystemExit) as end:
        report.main(["nobody"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "there is no run" in said


# -- charts ------------------------------------------------------------------------------------------------------------


def points(svg: str) -> list[tuple[float, float]]:
    line = re.search(r'points="([^"]+)"', svg)[1]
    return [tuple(map(float, pair.split(","))) for pair in line.split()]


def test_a_line_goes_where_its_values_are():
    drawn = points(chart("x", {"training": [(0, 1.0), (5, 3.0), (10, 2.0)]}))
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.2) and y1 < y2 < y0, "up is less on a screen"
    assert math.isclose((y0 - y1) / (y0 - y2), 2.0, rel_tol=0.01)
    logarithmic = points(chart("x", {"training": [(0, 1.0), (5, 10.0), (10, 100.0)]}, log=True))
    assert math.isclose(logarithmic[0][1] - logarithmic[1][1], logarithmic[1][1] - logarithmic[2][1], abs_tol=0.2)


@pytest.mark.parametrize("values", ([5.0], [2.0, 2.0], [0.0, 0.0], [1.0, math.nan, math.inf, 3.0], [-1.0, 0.0, 1e9]))
@pytest.mark.parametrize("log", (False, True))
def test_any_values_make_a_chart(values, log):
    svg = chart("x", {"training": list(enumerate(values))}, log)
    Page(svg)
    assert len(points(svg)) == sum(map(math.isfinite, values)) and "nan" not in svg


def test_nothing_makes_no_chart():
    assert chart("x", {"training": [], "validation": [(1, math.nan)]}) == ""


def test_thinning_keeps_every_spike():
    curve = [(n, 1.0 + n / 1e6) for n in range(10_000)]
    curve[1234], curve[7777] = (1234, 99.0), (7777, -5.0)
    kept = thin(curve)
    assert len(kept) <= MOST and kept == sorted(kept) and {(1234, 99.0), (7777, -5.0)} <= set(kept)

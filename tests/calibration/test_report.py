"""One call gives a table whose numbers are the metrics', and a page that stands alone."""

import base64
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import image
from torch.distributions import Normal

from lapkit.calibration import (
    Samples,
    accuracy,
    auroc,
    brier,
    central_interval,
    crps,
    entropy,
    expected_calibration_error,
    interval_coverage,
    mae,
    nll,
    predictive_nll,
    report,
    risk_coverage_curve,
    rmse,
)
from lapkit.calibration.report_page import panels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """What a page has in it, with the tags checked to be closed in order."""

    VOID = ("meta", "img", "br", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.images, self.words = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def classes(count=120):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 3, generator=generator)
    y = torch.multinomial((logits / 2).softmax(1), 1, generator=generator)[:, 0]
    far = torch.randn(40, 3, generator=generator)
    methods = {"MAP": 1.0, NASTY: 0.5}
    inside, outside = ({name: (scale * f).softmax(1) for name, scale in methods.items()} for f in (logits, far))
    return inside, y, outside


def regression(count=90):
    mean, std = torch.randn(count), torch.rand(count) + 0.5
    return {"MAP": (mean, 0.5 * std), "Laplace": Normal(mean, 2 * std)}, mean + std * torch.randn(count)


@pytest.fixture(scope="module")
def pages():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    predictions, y, far = classes()
    pictures = torch.rand(120, 1, 4, 5)
    first = report(
        predictions, y, ood=far, inputs=pictures, class_names=[NASTY, "b", "c"], title=NASTY, notes=[NASTY], focus=NASTY
    )
    numbers, targets = regression()
    names = [NASTY, *(f"x{i}" for i in range(13))]
    second = report(numbers, targets, ood=numbers, inputs=torch.rand(90, 14), feature_names=names, unit=NASTY)
    return first.to_html(), second.to_html()


def test_scores_of_classes_are_the_metrics():
    predictions, y, far = classes()
    found = report(predictions, y, ood=far, bins=10)
    assert list(found.rows) == list(predictions)
    for name, p in predictions.items():
        expected = {
            "accuracy": accuracy(p, y),
            "confidence": float(p.max(1).values.mean()),
            "NLL": nll(p, y),
            "Brier": brier(p, y),
            "ECE": expected_calibration_error(p, y, bins=10),
            "AURC": risk_coverage_curve(p, y).aurc,
            "OOD AUROC": auroc(entropy(p), entropy(far[name])),
        }
        row = dict(found.rows[name])
        assert row.pop("by chance") > 0
        assert row == pytest.approx(expected, abs=1e-12)
    assert "OOD AUROC" not in report(predictions, y).rows["MAP"]


def test_scores_of_a_regression_are_the_metrics():
    predictions, y = regression()
    found = report(predictions, y, ood=predictions)
    for name, prediction in predictions.items():
        row = found.rows[name]
        assert row["RMSE"] == rmse(prediction, y)
        assert row["MAE"] == mae(prediction, y)
        assert row["NLL"] == predictive_nll(prediction, y)
        assert row["CRPS"] == crps(prediction, y)
        assert row["in 90 %"] == interval_coverage(central_interval(prediction, coverage=0.9), y)
        assert row["OOD AUROC"] == 0.5
    draws = report({"draws": Samples(torch.randn(50, 90))}, y)
    assert np.isnan(draws.rows["draws"]["NLL"])
    assert draws.to_dict()["rows"]["draws"]["NLL"] is None
    assert "nan" not in str(draws) + draws.to_html()


def test_the_table_prints_a_line_for_each_method():
    predictions, y = regression()
    found = report(predictions, y, unit="m", notes=["Mind this."])
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["method", "RMSE", "MAE"]
    assert lines[2].split()[:2] == ["MAP", f"{found.rows['MAP']['RMSE']:.3f}"]
    assert lines[3].startswith("Laplace")
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-1] == "Mind this."
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["rows"]["MAP"]["RMSE"] == found.rows["MAP"]["RMSE"]
    assert plain["units"]["RMSE"] == "m"
    assert repr(found) == "Report('How good, and how sure': MAP, Laplace)"


@pytest.mark.parametrize("which", [0, 1])
def test_the_page_needs_nothing_from_elsewhere(pages, which):
    found = Page(pages[which])
    tags = {tag for tag, _ in found.seen}
    assert not tags & {"script", "link", "iframe", "object", "form"}
    assert "http" not in pages[which]
    assert "@import" not in pages[which]
    assert "url(" not in pages[which]
    sources = [attrs[key] for _, attrs in found.seen for key in ("src", "href") if key in attrs]
    assert len(sources) >= 6
    for source in sources:
        kind, data = source.split(";base64,")
        raw = base64.b64decode(data, validate=True)
        if kind == "data:image/svg+xml":
            root = ElementTree.fromstring(raw)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert not [e for e in root.iter() if e.tag.endswith("script")]
        else:
            assert kind == "data:image/png"
            assert image.imread(io.BytesIO(raw)).shape[:2] == (4, 5)
    assert all(attrs["alt"] for tag, attrs in found.seen if tag == "img")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.seen


@pytest.mark.parametrize("which", [0, 1])
def test_words_of_the_user_are_words(pages, which):
    assert "<script" not in pages[which]
    assert "alert(" in "".join(Page(pages[which]).words)


def test_the_page_has_the_numbers_and_marks_the_best(tmp_path):
    predictions, y, _ = classes()
    found = report(predictions, y)
    text = found.save(tmp_path / "page.html").read_text(encoding="utf-8")
    words = Page(text).words
    for row in found.rows.values():
        assert f"{row['NLL']:.3f}" in words
    best = min(row["NLL"] for row in found.rows.values())
    assert f'<td class="best">{best:.3f}</td>' in text
    # The same decisions: no accuracy is better than the other.
    assert f'<td class="best">{found.rows["MAP"]["accuracy"]:.3f}</td>' not in text


def test_the_same_report_gives_the_same_page():
    drawings = [("a dot", lambda ax: ax.plot([0.5], [0.5], marker="o"))]
    one, two = (panels(drawings, size=(2, 2), wide=True) for _ in range(2))
    assert one == two


def test_the_most_uncertain_examples_are_shown_with_their_features(pages):
    words = Page(pages[1]).words
    assert "2 more features are not shown." in words
    predictions, y, _ = classes(5)
    text = report({"a": predictions["MAP"]}, y, inputs=np.arange(5.0)).to_html()
    order = entropy(predictions["MAP"]).argsort(descending=True).tolist()
    tags = [f'<th scope="row">{i}</th>' for i in order]
    places = [text.index(tag) for tag in tags]
    assert places == sorted(places)


def test_without_matplotlib_the_table_is_still_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    predictions, y, _ = classes()
    found = report(predictions, y)
    assert "MAP" in str(found)
    with pytest.raises(ImportError, match=r"pip install lapkit\[plot\]"):
        found.to_html()


def test_a_single_example():
    report({"a": torch.tensor([0.2])}, torch.tensor([0])).to_html()
    report({"a": (torch.zeros(1), 1.0)}, torch.ones(1)).to_html()


def test_what_does_not_fit_is_refused():
    p, y = torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="by method"):
        report(p, y)
    with pytest.raises(ValueError, match="no prediction"):
        report({}, y)
    with pytest.raises(TypeError, match="one kind"):
        report({"a": p, "b": (p, 1.0)}, y)
    with pytest.raises(ValueError, match="focus is 'c'"):
        report({"a": p}, y, focus="c")
    with pytest.raises(ValueError, match="ood has"):
        report({"a": p, "b": p}, y, ood={"a": p})
    with pytest.raises(ValueError, match="3 class_names"):
        report({"a": p}, y, class_names=["x", "y", "z"])
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        report({"a": p}, y, inputs=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="1 feature_names"):
        report({"a": p}, y, inputs=torch.zeros(2, 2), feature_names=["x"]).to_html()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with")
@pytest.mark.parametrize("width", [500, 1200])  # headless windows are no narrower
def test_a_browser_shows_the_page(pages, tmp_path, width):
    """Every picture is decoded, and nothing but the tables, which scroll, is wider than the window."""
    probe = (
        "<script>addEventListener('load', () => document.body.setAttribute('data-found', JSON.stringify({"
        "broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,"
        "wide: document.documentElement.scrollWidth > innerWidth, images: document.images.length})))</script>"
    )
    file = tmp_path / "page.html"
    file.write_text(pages[0].replace("</body>", probe + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--window-size={width},900", "--dump-dom"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (found,) = [attrs["data-found"] for tag, attrs in Page(done.stdout).seen if tag == "body"]
    assert json.loads(found) == {"broken": 0, "wide": False, "images": pages[0].count("<img")}

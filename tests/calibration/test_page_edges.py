"""Pages of awkward reports: every curve is in the picture, and names of any length and letters leave room for it."""

import re
import shutil
import subprocess

import pytest
import torch
from matplotlib.figure import Figure

from lapkit.calibration import Samples, report, risk_coverage_curve
from lapkit.calibration.report_diagrams import caption
from lapkit.calibration.report_table import Column

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONG = "an ensemble of five networks, each recalibrated by its own temperature on held-out data"


def test_a_worse_curve_after_a_better_one_is_in_the_picture():
    ax = Figure().subplots()
    p = torch.eye(2)[[0, 1, 0, 1]]
    for labels in ([0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1]):
        risk_coverage_curve(p, torch.tensor(labels)).plot(ax)
    low, high = ax.get_ylim()
    assert low == 0
    assert high >= 1


@pytest.mark.parametrize("name", ["a $x^{$ b", "_private"])
def test_names_are_no_formulas(name):
    p, y = torch.rand(20), torch.arange(20) % 2
    assert report({name: p, "b": p}, y, ood={name: p, "b": p}).to_html()
    given = (torch.zeros(20), 1.0)
    assert report({name: given}, p, unit=name, ood={name: given}).to_html()


def test_captions_are_short_lines_that_legends_take():
    assert caption("MAP") == "MAP"
    assert caption(LONG).replace("\n", " ") == LONG
    assert max(map(len, caption(LONG).splitlines())) <= 36
    assert not caption("_private").startswith("_")


def test_the_best_of_infinities_and_none():
    column = Column("NLL", "nats", "smaller", "")
    assert column.best([float("inf"), 0.5]) == 0.5
    assert column.best([float("nan"), 0.5]) is None
    assert column.best([0.5, 0.5]) is None
    assert Column("z", "", 1.0, "").best([float("inf"), 3.0, 0.5]) == 0.5


def test_confidences_that_rounding_puts_outside_are_in_the_histogram():
    p = torch.tensor([[1.0005, 0.0], [0.0, 1.0005]], dtype=torch.float32)
    section = report({"MAP": p}, torch.tensor([0, 1])).sections[2]
    (picture,) = re.findall(r"base64,([^\"]*)", section.content())
    inside = report({"MAP": p.clamp(max=1)}, torch.tensor([0, 1])).sections[2].content()
    assert picture in inside


def test_samples_have_a_dash_for_the_likelihood():
    found = report({"draws": Samples(torch.randn(5, 8)), "b": (torch.zeros(8), 1.0)}, torch.randn(8))
    assert "<td>-</td>" in found.to_html()
    assert found.to_dict()["rows"]["draws"]["NLL"] is None


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with")
def test_names_leave_room_for_numbers_on_a_phone(tmp_path):
    p, y = torch.rand(20), torch.arange(20) % 2
    probe = (
        "<script>addEventListener('load', () => document.body.setAttribute('data-share',"
        "document.querySelector('tbody th').getBoundingClientRect().width / innerWidth))</script>"
    )
    file = tmp_path / "page.html"
    text = report({LONG: p, "unbroken" * 12: p}, y).to_html()
    file.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--window-size=500,900", "--dump-dom"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    share = float(re.findall(r'data-share="([^"]*)"', done.stdout)[0])
    assert 0.2 < share < 0.5

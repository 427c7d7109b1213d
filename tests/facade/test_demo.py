import copy
import re
from dataclasses import fields

import pytest
import torch
from sklearn.datasets import load_digits

from lapkit import cli, demo
from lapkit.calibration import TemperatureScaling
from lapkit.datasets import digits
from lapkit.demo_networks import train_together


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "OTHERS", 1)  # a smaller ensemble, for the time it takes
        return demo.run(out=tmp_path_factory.mktemp("out"), progress_bar=False)


def test_every_posterior_improves_an_overconfident_network(report):
    map_row, tempered, *rows, ensemble = report.rows
    assert [map_row.name, tempered.name, ensemble.name] == ["MAP", "MAP + temperature", "ensemble of 2"]
    assert len(rows) == 4
    for row in rows:
        assert row.nll < 0.6 * map_row.nll
        assert row.ece < 0.7 * map_row.ece
        assert row.accuracy == pytest.approx(map_row.accuracy, abs=0.02)
        assert row.log_evidence < 0
    assert tempered.nll < 0.6 * map_row.nll
    assert ensemble.nll < 0.8 * map_row.nll
    assert ensemble.accuracy > map_row.accuracy
    assert tempered.log_evidence is ensemble.log_evidence is None
    assert tempered.accuracy == map_row.accuracy


def test_networks_trained_together_are_those_trained_alone():
    data = digits(noise=0.5, train=200)
    torch.manual_seed(3)
    alone = [demo.network(8) for _ in range(2)]
    together = copy.deepcopy(alone)
    for model, seed in zip(alone, (4, 5), strict=True):
        demo.train(model, data, epochs=2, seed=seed, progress_bar=False)
    train_together(together, data, epochs=2, seeds=(4, 5), progress_bar=False)
    for one, two in zip(alone, together, strict=True):
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
            assert b.requires_grad


def test_each_temperature_is_fitted_to_the_other_half():
    data = digits(noise=0.5, train=200)
    torch.manual_seed(3)
    model = demo.network(8)
    demo.train(model, data, epochs=10, seed=0, progress_bar=False)
    plain, tempered = demo._of_map(model, data)
    logits = plain.inside.double().log()
    for half in (0, 1):
        scaling = TemperatureScaling.fit(logits[1 - half :: 2], data.test_y[1 - half :: 2])
        assert torch.allclose(tempered.inside[half::2], scaling(logits[half::2]), atol=1e-5)


def test_pictures_are_written(report):
    assert [p.name for p in report.pictures] == ["reliability.png", "certain_and_uncertain.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in report.pictures)
    assert report.page.name == "report.html"
    assert report.page.read_text().count("<img") == 9 + 12  # diagrams and digits


@pytest.fixture
def _hasty(monkeypatch):
    monkeypatch.setattr(demo, "OTHERS", 1)
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 8)


@pytest.mark.usefixtures("_hasty")
def test_the_same_seed_gives_the_same_table(tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two = (demo.run(quick=True, out=tmp_path, progress_bar=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    numbers = [f.name for f in fields(demo.Row) if not f.name.endswith("_seconds")]
    for a, b in zip(one.rows, two.rows, strict=True):
        assert [getattr(a, n) for n in numbers] == [getattr(b, n) for n in numbers]
    assert one.pruned == two.pruned


def test_the_table_has_a_line_for_each_posterior(report):
    text = demo.table(report)
    for row in report.rows:
        line = next(line for line in text.splitlines() if line.startswith(row.name))
        numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", line)]
        assert numbers[:5] == pytest.approx([row.accuracy, row.nll, row.ece, row.brier, row.ood_auroc], abs=5e-4)
    assert f"{report.pruned.obd_accuracy:.3f} by curvature" in text


@pytest.mark.usefixtures("_hasty")
def test_the_command_prints_the_table(capsys, tmp_path):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "new")]) == 0
    assert "kron, all layers" in capsys.readouterr().out
    assert (tmp_path / "new" / "reliability.png").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error_that_says_so(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_demo_runs_on_a_gpu(tmp_path):
    report = demo.run(device="cuda", quick=True, out=tmp_path, progress_bar=False)
    assert all(row.nll < report.rows[0].nll for row in report.rows[1:])


def test_digits_are_the_real_ones_and_classes_are_kept_apart():
    data = digits(train=900, held_out=(3, 5), seed=4)
    raw = load_digits()
    assert data.classes == (0, 1, 2, 4, 6, 7, 8, 9)
    assert len(data.train_x) == 900
    assert len(data.train_x) + len(data.test_x) + len(data.ood_x) == len(raw.images)
    everything = torch.cat([data.train_x, data.test_x, data.ood_x]).reshape(-1, 64)
    original = torch.tensor(raw.images / 16, dtype=torch.float32).reshape(-1, 64)
    assert torch.equal(everything.sum(0).round(decimals=2), original.sum(0).round(decimals=2))
    # Each image has the label it had: look it up by its pixels.
    lookup = {tuple(image.tolist()): label for image, label in zip(original, raw.target.tolist(), strict=True)}
    for image, label in zip(data.test_x[:50], data.test_y[:50], strict=True):
        assert data.classes[label] == lookup[tuple(image.flatten().tolist())]


def test_digits_depend_on_the_seed_only():
    one, two, other = digits(noise=0.2, seed=1), digits(noise=0.2, seed=1), digits(noise=0.2, seed=2)
    assert torch.equal(one.train_x, two.train_x)
    assert not torch.equal(one.train_x, other.train_x)


def test_more_training_images_than_there_are():
    with pytest.raises(ValueError, match="cannot train on 5000"):
        digits(train=5000)

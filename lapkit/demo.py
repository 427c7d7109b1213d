"""The main job on real data: a trained network in; calibrated uncertainty, its evidence and a pruned network out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lapkit.calibration import TemperatureScaling, accuracy, auroc, brier, entropy, expected_calibration_error, nll
from lapkit.datasets import Digits, digits
from lapkit.demo_networks import network, train, train_together
from lapkit.demo_pictures import page, pictures
from lapkit.laplace import Laplace
from lapkit.pruning import apply_masks, magnitude_saliency, obd_saliency, predicted_increase, pruning_masks

# Networks of the ensemble besides the one that Laplace is fitted to.
OTHERS = 4
EPOCHS, QUICK_EPOCHS = 150, 60
POSTERIORS = (("last_layer", "diag"), ("last_layer", "kron"), ("last_layer", "full"), ("all", "kron"))
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table: a predictive and how good it is.

    Args:
        name: of the posterior.
        accuracy: on test digits.
        nll: negative log likelihood, nats.
        ece: expected calibration error.
        brier: score, in [0, 2].
        ood_auroc: how well entropy tells digits of held-out classes from test digits.
        log_evidence: log marginal likelihood of the training data; None where there is none.
        fit_seconds: after the training of the network; of the ensemble, training of the others.
        predict_seconds: for all test digits.
    """

    name: str
    accuracy: float
    nll: float
    ece: float
    brier: float
    ood_auroc: float
    log_evidence: float | None
    fit_seconds: float
    predict_seconds: float


@dataclass(frozen=True)
class Pruned:
    """Half of the weights removed, without retraining.

    Args:
        dense_accuracy: before.
        obd_accuracy: after pruning by curvature.
        magnitude_accuracy: after pruning by size.
        predicted_increase: of the summed training loss by the curvature criterion, in nats.
        actual_increase: the same, measured.
    """

    dense_accuracy: float
    obd_accuracy: float
    magnitude_accuracy: float
    predicted_increase: float
    actual_increase: float


@dataclass(frozen=True)
class Report:
    """What the demo found.

    Args:
        rows: MAP first.
        pruned: what pruning did.
        pictures: files written.
        page: file with the report to be read in a browser; None without matplotlib.
    """

    rows: tuple[Row, ...]
    pruned: Pruned
    pictures: tuple[Path, ...]
    page: Path | None


def run(
    *, device: str = "cpu", quick: bool = False, out: Path = Path("outputs"), seed: int = 0, progress_bar: bool = True
) -> Report:
    """Train, fit, compare, prune and draw.

    Args:
        device: "cpu" or "cuda".
        quick: train for a few epochs only.
        out: folder for the pictures and the page.
        seed: of data, weights and batches; the same seed gives the same numbers, times apart.
        progress_bar: show progress.

    Returns:
        All figures of the printed table.

    Raises:
        ValueError: if the device is not there.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"Device {device!r} was asked for, but torch sees no CUDA device. Use --device cpu.")
    data = digits(noise=0.5, seed=seed)
    models = _networks(1 + OTHERS, len(data.classes), seed, device)
    epochs = QUICK_EPOCHS if quick else EPOCHS
    train(models[0], data, epochs=epochs, seed=seed, progress_bar=progress_bar)
    model = models[0].eval()
    # A loader without a generator of its own draws its workers' seed from the caller's random numbers.
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), batch_size=100, generator=torch.Generator())
    found = [*_of_map(model, data)]
    for subset, structure in POSTERIORS:
        la = Laplace(model, "classification", subset_of_weights=subset, hessian_structure=structure)
        name = f"{structure}, {'last layer' if subset == 'last_layer' else 'all layers'}"
        found.append(_of_laplace(name, la, loader, data, progress_bar))
    seeds = range(seed + 1, seed + 1 + OTHERS)
    _, seconds = _timed(lambda: train_together(models[1:], data, epochs=epochs, seeds=seeds, progress_bar=progress_bar))
    found.append(_of_ensemble(models, data, seconds))
    pruned = _prune(model, data, loader)
    rows = tuple(_row(each, data) for each in found)
    if find_spec("matplotlib") is None:
        return Report(rows, pruned, (), None)
    inside, outside = {each.name: each.inside for each in found}, {each.name: each.outside for each in found}
    drawn = pictures(data, inside, out)
    return Report(rows, pruned, drawn, page(data, inside, outside, out))


@dataclass(frozen=True)
class _Predicted:
    """What one method says of the test digits and of those held out."""

    name: str
    inside: Tensor
    outside: Tensor
    log_evidence: float | None
    fit_seconds: float
    predict_seconds: float


def _networks(count: int, classes: int, seed: int, device: str) -> list[nn.Sequential]:
    """Untrained networks, each with a seed of its own; the caller's random numbers go on as if nothing had happened."""
    found = []
    with torch.random.fork_rng():
        for number in range(count):
            torch.manual_seed(seed + number)
            found.append(network(classes).to(device))
    return found


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.to(next(model.parameters()).device))


def _of_map(model: nn.Module, data: Digits) -> tuple[_Predicted, _Predicted]:
    """The network as it is, and each half of its logits divided by the temperature that suits the other half."""
    logits, seconds = _timed(lambda: _outputs(model, data.test_x))
    elsewhere = _outputs(model, data.ood_x)
    inside, outside = (torch.empty(f.shape, dtype=torch.float64, device=f.device) for f in (logits, elsewhere))

    def temper() -> None:
        for half in (0, 1):
            scaling = TemperatureScaling.fit(logits[1 - half :: 2], data.test_y[1 - half :: 2])
            inside[half::2], outside[half::2] = scaling(logits[half::2]), scaling(elsewhere[half::2])

    _, fit = _timed(temper)
    plain = _Predicted("MAP", logits.softmax(-1), elsewhere.softmax(-1), None, 0.0, seconds)
    return plain, _Predicted("MAP + temperature", inside, outside, None, fit, seconds)


def _of_laplace(
    name: str, la: Laplace, loader: DataLoader[tuple[Tensor, ...]], data: Digits, progress_bar: bool
) -> _Predicted:
    def predict(x: Tensor) -> Tensor:
        result = la(x)
        assert isinstance(result, Tensor)  # probabilities, for classes
        return result

    _, fit = _timed(lambda: la.fit(loader, progress_bar=progress_bar).optimize_prior_precision())
    inside, seconds = _timed(lambda: predict(data.test_x))
    return _Predicted(name, inside, predict(data.ood_x), float(la.log_marginal_likelihood()), fit, seconds)


def _of_ensemble(models: Sequence[nn.Module], data: Digits, training: float) -> _Predicted:
    """The mean of the probabilities; its fit is the training of all networks but the first."""

    def mean(x: Tensor) -> Tensor:
        return torch.stack([_outputs(model.eval(), x).softmax(-1) for model in models]).mean(0)

    inside, seconds = _timed(lambda: mean(data.test_x))
    return _Predicted(f"ensemble of {len(models)}", inside, mean(data.ood_x), None, training, seconds)


def _timed(job: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _row(found: _Predicted, data: Digits) -> Row:
    inside = found.inside
    return Row(
        found.name,
        accuracy(inside, data.test_y),
        nll(inside, data.test_y),
        expected_calibration_error(inside, data.test_y),
        brier(inside, data.test_y),
        auroc(entropy(inside), entropy(found.outside)),
        found.log_evidence,
        found.fit_seconds,
        found.predict_seconds,
    )


def _prune(model: nn.Module, data: Digits, loader: DataLoader[tuple[Tensor, ...]]) -> Pruned:
    """Half of the weights removed, by curvature and by size."""
    device = next(model.parameters()).device
    x, y = data.train_x.to(device), data.train_y.to(device)

    def figures(net: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            test = net(data.test_x.to(device)).softmax(-1)
            return accuracy(test, data.test_y), float(F.cross_entropy(net(x), y, reduction="sum"))

    dense, loss = figures(model)
    by_curvature, by_size = copy.deepcopy(model), copy.deepcopy(model)
    la = Laplace(by_curvature, "classification", subset_of_weights="all", hessian_structure="diag").fit(loader)
    saliency = obd_saliency(la)
    masks = pruning_masks(saliency, 0.5)
    obd, pruned_loss = figures(apply_masks(by_curvature, masks, permanent=True))
    size_masks = pruning_masks(magnitude_saliency(by_size), 0.5)
    magnitude, _ = figures(apply_masks(by_size, size_masks, permanent=True))
    return Pruned(dense, obd, magnitude, predicted_increase(saliency, masks), pruned_loss - loss)


def table(report: Report) -> str:
    """The report as text for a terminal."""
    head = (
        f"{'method':<18}{'accuracy':>9}{'NLL':>8}{'ECE':>8}{'Brier':>8}{'OOD AUROC':>11}{'log evidence':>14}"
        f"{'fit s':>8}{'predict s':>11}"
    )
    lines = [head, "-" * len(head)]
    for r in report.rows:
        evidence = "" if r.log_evidence is None else f"{r.log_evidence:.1f}"
        lines.append(
            f"{r.name:<18}{r.accuracy:>9.3f}{r.nll:>8.3f}{r.ece:>8.3f}{r.brier:>8.3f}{r.ood_auroc:>11.3f}{evidence:>14}"
            f"{r.fit_seconds:>8.2f}{r.predict_seconds:>11.3f}"
        )
    lines += [
        "",
        "Real digits 0 to 7 with sensor noise; out of distribution: the digits 8 and 9, which training never saw.",
        "Log evidences rank models with the same set of random weights, not last layer against all layers.",
        "The temperature of each half of the test digits was fitted to the other half.",
        "",
        f"50 % of the weights pruned, no retraining: accuracy {report.pruned.obd_accuracy:.3f} by curvature (OBD), "
        f"{report.pruned.magnitude_accuracy:.3f} by magnitude, {report.pruned.dense_accuracy:.3f} dense.",
        f"Training loss of the OBD-pruned network: +{report.pruned.actual_increase:.1f} nats, predicted "
        f"+{report.pruned.predicted_increase:.1f}.",
        "",
    ]
    if report.pictures:
        lines.append("Pictures: " + ", ".join(str(p) for p in report.pictures))
        lines.append(f"Page: {report.page}")
    else:
        lines.append("No pictures: matplotlib is not installed. Run: pip install lapkit[plot]")
    return "\n".join(lines)

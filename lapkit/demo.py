"""The main job on real data: a trained network in; calibrated uncertainty, its evidence and a pruned network out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lapkit.calibration import accuracy, auroc, brier, entropy, expected_calibration_error, nll, reliability_curve
from lapkit.datasets import Digits, digits
from lapkit.laplace import Laplace
from lapkit.pruning import apply_masks, magnitude_saliency, obd_saliency, predicted_increase, pruning_masks

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
        log_evidence: log marginal likelihood of the training data; None for the MAP network.
        fit_seconds: fit and tuning of the prior.
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
    """

    rows: tuple[Row, ...]
    pruned: Pruned
    pictures: tuple[Path, ...]


def network(classes: int) -> nn.Sequential:
    """A convolutional network with 2,552 weights for 8 classes of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def train(model: nn.Module, data: Digits, *, epochs: int, seed: int, progress_bar: bool = True) -> None:
    """Adam, one cycle, hardly any weight decay: a network that has learnt its noisy training digits by heart."""
    device = next(model.parameters()).device
    x, y = data.train_x.to(device), data.train_y.to(device)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(x) // 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=3e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * batches)
    bar = tqdm(range(epochs), desc="training", disable=not progress_bar, leave=False)
    for _ in bar:
        for index in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def run(
    *, device: str = "cpu", quick: bool = False, out: Path = Path("outputs"), seed: int = 0, progress_bar: bool = True
) -> Report:
    """Train, fit, compare, prune and draw.

    Args:
        device: "cpu" or "cuda".
        quick: train for a few epochs only.
        out: folder for the pictures.
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
    with torch.random.fork_rng():  # the caller's random numbers go on as if nothing had happened
        torch.manual_seed(seed)
        model = network(len(data.classes)).to(device)
    train(model, data, epochs=60 if quick else 150, seed=seed, progress_bar=progress_bar)
    model.eval()

    def softmax(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x.to(device)).softmax(-1)

    probabilities, seconds = _timed(lambda: softmax(data.test_x))
    predictives = {"MAP": probabilities}
    rows = [_row("MAP", data, probabilities, softmax(data.ood_x), None, 0.0, seconds)]
    # A loader without a generator of its own draws its workers' seed from the caller's random numbers.
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), batch_size=100, generator=torch.Generator())

    def predict(la: Laplace, x: Tensor) -> Tensor:
        result = la(x)
        assert isinstance(result, Tensor)  # probabilities, for classes
        return result

    for subset, structure in POSTERIORS:
        name = f"{structure}, {'last layer' if subset == 'last_layer' else 'all layers'}"
        la = Laplace(model, "classification", subset_of_weights=subset, hessian_structure=structure)
        _, fit_seconds = _timed(lambda la=la: la.fit(loader, progress_bar=progress_bar).optimize_prior_precision())  # type: ignore[misc]
        probabilities, seconds = _timed(lambda la=la: predict(la, data.test_x))  # type: ignore[misc]
        predictives[name] = probabilities
        evidence = float(la.log_marginal_likelihood())
        rows.append(_row(name, data, probabilities, predict(la, data.ood_x), evidence, fit_seconds, seconds))
    pictures = _pictures(data, predictives, out) if find_spec("matplotlib") else ()
    return Report(tuple(rows), _prune(model, data, loader), pictures)


def _timed(job: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _row(
    name: str, data: Digits, inside: Tensor, outside: Tensor, evidence: float | None, fit: float, predict: float
) -> Row:
    return Row(
        name,
        accuracy(inside, data.test_y),
        nll(inside, data.test_y),
        expected_calibration_error(inside, data.test_y),
        brier(inside, data.test_y),
        auroc(entropy(inside), entropy(outside)),
        evidence,
        fit,
        predict,
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


def _pictures(data: Digits, predictives: dict[str, Tensor], out: Path) -> tuple[Path, ...]:
    """Reliability diagrams of MAP and of the posterior over all layers, and the digits it is most and least sure of."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    names = ("MAP", "kron, all layers")
    figure = Figure(figsize=(9, 5), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), names, strict=True):
        reliability_curve(predictives[name], data.test_y).plot(ax)
        ax.set_title(name)
    reliability = out / "reliability.png"
    figure.savefig(reliability, dpi=120)

    probabilities = predictives[names[1]].cpu()
    order = entropy(probabilities).argsort(stable=True)
    count = 8
    figure = Figure(figsize=(count * 1.15, 3.4), layout="constrained")
    rows = figure.subplots(2, count)
    titles = ("most certain", "least certain")
    for axes, chosen, title in zip(rows, (order[:count], order.flip(0)[:count]), titles, strict=True):
        axes[0].set_ylabel(title, fontsize=10)
        for ax, i in zip(axes, chosen.tolist(), strict=True):
            confidence, guess = probabilities[i].max(0)
            right = int(guess) == int(data.test_y[i])
            ax.imshow(data.test_x[i, 0].numpy(), cmap="gray_r", vmin=-0.5, vmax=1.5, interpolation="bicubic")
            ax.set_title(
                f"{data.classes[int(guess)]} at {float(confidence):.0%}\nis {data.classes[int(data.test_y[i])]}",
                fontsize=9,
                color="black" if right else "#D55E00",
            )
            ax.set_xticks([])
            ax.set_yticks([])
    certain = out / "certain_and_uncertain.png"
    figure.savefig(certain, dpi=120)
    return reliability, certain


def table(report: Report) -> str:
    """The report as text for a terminal."""
    head = (
        f"{'posterior':<18}{'accuracy':>9}{'NLL':>8}{'ECE':>8}{'Brier':>8}{'OOD AUROC':>11}{'log evidence':>14}"
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
        "",
        f"50 % of the weights pruned, no retraining: accuracy {report.pruned.obd_accuracy:.3f} by curvature (OBD), "
        f"{report.pruned.magnitude_accuracy:.3f} by magnitude, {report.pruned.dense_accuracy:.3f} dense.",
        f"Training loss of the OBD-pruned network: +{report.pruned.actual_increase:.1f} nats, predicted "
        f"+{report.pruned.predicted_increase:.1f}.",
        "",
    ]
    if report.pictures:
        lines.append("Pictures: " + ", ".join(str(p) for p in report.pictures))
    else:
        lines.append("No pictures: matplotlib is not installed. Run: pip install lapkit[plot]")
    return "\n".join(lines)

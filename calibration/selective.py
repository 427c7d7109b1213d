"""Selective prediction: the error that is left when the least confident predictions are withheld."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lapkit.calibration.diagrams import draw_risk_coverage, new_axes
from lapkit.calibration.event_inputs import as_scores
from lapkit.calibration.inputs import Array
from lapkit.calibration.pairs import Ranked
from lapkit.calibration.ties import average_over_ties

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, eq=False)
class RiskCoverageCurve:
    """The error rate of the n most confident predictions, for n from 1 to N.

        risk_n = 1/n sum_{i <= n} e_(i),    coverage_n = n / N,    generalised risk g_n = n risk_n / N

    Among equally confident ones errors are shared out evenly, which is the mean over their orders: saturated
    confidences would else give the order of the data set a say.

    Attributes:
        risk: `(N,)` float64.
    """

    risk: Tensor

    @property
    def coverage(self) -> Tensor:
        """`n / N`, `(N,)` float64."""
        examples = len(self.risk)
        return torch.arange(1, examples + 1, dtype=torch.float64, device=self.risk.device) / examples

    @property
    def generalised_risk(self) -> Tensor:
        """The share of all examples that are predicted and wrong, `n risk_n / N`, `(N,)`."""
        return self.risk * self.coverage

    @property
    def aurc(self) -> float:
        """Area under the risk-coverage curve, `1/N sum_n risk_n` (Geifman et al. 2019, equation 4)."""
        return self.risk.mean().item()

    @property
    def aurc_trapezoid(self) -> float:
        """The area by trapezoids over coverages from 1/N to 1, divided by their range; of one example its risk.

        The convention of some libraries, a little apart from `aurc`.
        """
        return _trapezoid(self.risk)

    @property
    def e_aurc(self) -> float:
        """The AURC in excess of the best possible order, all errors last (Geifman et al. 2019, section 4).

        The best is that of the N examples at hand, not its limit `r + (1 - r) log(1 - r)` for many.
        """
        examples = len(self.risk)
        wrong = round(self.risk[-1].item() * examples)
        number = torch.arange(1, examples + 1, dtype=torch.float64, device=self.risk.device)
        best = (number - (examples - wrong)).clamp(min=0) / number
        return self.aurc - best.mean().item()

    @property
    def augrc(self) -> float:
        """Area under the generalised risk-coverage curve from coverage 0 on, where it is 0, by trapezoids: exact.

        `(1 - AUROC_f) acc (1 - acc) + (1 - acc)^2 / 2` with the AUROC of failure detection; in [0, 1/2]. Unlike AURC
        it does not hang on the few most confident examples (Traub et al. 2024, equations 6 and 7).
        """
        risk = self.generalised_risk
        return (risk.sum() - risk[-1] / 2).item() / len(risk)

    @property
    def augrc_trapezoid(self) -> float:
        """The generalised area over coverages from 1/N to 1, divided by their range, as some libraries have it."""
        return _trapezoid(self.generalised_risk)

    def risk_at(self, coverage: float) -> float:
        """The error rate when this share of the examples is predicted, the number of them rounded up.

        Args:
            coverage: in (0, 1].

        Returns:
            The risk of the `ceil(coverage N)` most confident.

        Raises:
            ValueError: the coverage is not in (0, 1].
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage is {coverage}, expected a share in (0, 1].")
        # The small number keeps 0.7 * 10 from being a little more than 7.
        number = max(math.ceil(coverage * len(self.risk) - 1e-9), 1)
        return self.risk[number - 1].item()

    def coverage_at(self, risk: float) -> float:
        """The largest coverage with at most this error rate.

        Args:
            risk: the error rate that is allowed, in [0, 1].

        Returns:
            The coverage, in [0, 1]; zero if no number of examples is good enough.

        Raises:
            ValueError: the risk is not in [0, 1].
        """
        if not 0 <= risk <= 1:
            raise ValueError(f"risk is {risk}, expected an error rate in [0, 1].")
        # The small number keeps thirds of shared errors from adding up to a little more than one.
        allowed = (self.risk <= risk + 1e-12).nonzero()
        return (int(allowed[-1]) + 1) / len(self.risk) if len(allowed) else 0.0

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """Draw the risk against the coverage.

        Args:
            ax: the axes to draw in; new ones if None. Curves of several models go into the same.
            label: the name of the model in the legend.

        Returns:
            The axes.
        """
        summary = f"{label or 'model'}, AURC {self.aurc:.3f}"
        axes = new_axes() if ax is None else ax
        return draw_risk_coverage(axes, coverage=self.coverage.tolist(), risk=self.risk.tolist(), label=summary)


def risk_coverage_curve(probabilities: Array, labels: Array, *, confidence: Array | None = None) -> RiskCoverageCurve:
    """The error rate of the n most confident predictions against n / N.

    In batches: `Ranked(ranked_risks)`. A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        confidence: `(N,)` what to rank by, higher is surer, such as minus the entropy; the top probability if None.

    Returns:
        The curve, with areas and risks at given coverages.

    Raises:
        ValueError: the confidences are not one for each example.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]])
        >>> curve = risk_coverage_curve(p, torch.tensor([0, 1, 0, 0]))
        >>> curve.risk.tolist(), curve.aurc
        ([0.0, 0.0, 0.3333, 0.25], 0.1458)

    Reference:
        Geifman and El-Yaniv (2017), Selective classification for deep neural networks; Geifman, Uziel and El-Yaniv
        (2019), Bias-reduced uncertainty estimation for deep neural classifiers; Traub et al. (2024), Overcoming common
        flaws in the evaluation of selective classification systems.
    """
    metric = Ranked(ranked_risks)
    pairs = metric.summarise(probabilities, labels)
    if confidence is not None:
        given = as_scores(confidence, "confidence").to(pairs.device)
        if given.shape != pairs[:, 0].shape:
            raise ValueError(f"shape of confidence is {tuple(given.shape)}, expected ({len(pairs)},), one per example.")
        pairs = torch.stack((given, pairs[:, 1]), dim=1)
    return metric.finish(pairs)


def ranked_risks(confidence: Tensor, correct: Tensor) -> RiskCoverageCurve:
    """`risk_coverage_curve` of pairs.

    Args:
        confidence: `(N,)` what to rank by.
        correct: `(N,)` float64, ones and zeros.

    Returns:
        The curve.
    """
    wrong = average_over_ties(confidence, 1 - correct)[confidence.argsort(descending=True)]
    return RiskCoverageCurve(wrong.cumsum(dim=0) / torch.arange(1, len(wrong) + 1, device=wrong.device))


def _trapezoid(values: Tensor) -> float:
    return ((values[1:] + values[:-1]) / 2).mean().item() if len(values) > 1 else values.item()

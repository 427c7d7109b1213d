"""The reference's choice of the prior precision after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lapkit.compat.laplace.base import BaseLaplace
from lapkit.compat.laplace.options import Batches, notice
from lapkit.compat.laplace.utils.enums import Likelihood, LinkApprox, PredType, PriorStructure, TuningMethod
from lapkit.grid_search import Loss


class Tuning(BaseLaplace):
    """Prior precision by evidence, or on validation data."""

    def optimize_prior_precision(
        self,
        pred_type: str = PredType.GLM,
        method: str = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = PriorStructure.SCALAR,
        val_loader: Iterable[Any] | None = None,
        loss: Any = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
    ) -> None:
        """Set the prior precision; see `lapkit.Laplace.optimize_prior_precision`.

        Args:
            pred_type: "glm".
            method: "marglik", to the maximum of the evidence, or "gridsearch".
            n_steps: iterations at most.
            lr: not read: L-BFGS has no learning rate.
            init_prior_prec: where the search starts; a vector also sets the structure.
            prior_structure: "scalar", "layerwise" or "diag".
            val_loader: for "gridsearch".
            loss: for "gridsearch": of probabilities and targets, or of means, covariances and targets, taken batch by
                batch and averaged over examples; the negative log likelihood by default.
            log_prior_prec_min: exponent of the smallest value of the grid.
            log_prior_prec_max: of the largest.
            grid_size: number of values.
            link_approx: for "gridsearch".
            n_samples: for "gridsearch".
            verbose: print the result.
            progress_bar: show one.
            log_prior_prec_base: of the exponents.

        Raises:
            ValueError: if a name is unknown, or "gridsearch" is asked for without data or with sampled weights.
        """
        if TuningMethod(method) is TuningMethod.MARGLIK:
            if lr != 0.1:
                notice("lr is not read: the maximum of the evidence is found by L-BFGS.", stacklevel=3)
            if val_loader is not None:
                notice("val_loader is not read by method='marglik', which needs no held-out data.", stacklevel=3)
            self._by_evidence(n_steps, init_prior_prec, PriorStructure(prior_structure), progress_bar)
        elif PredType(pred_type) is PredType.NN:
            raise ValueError(
                "A grid search is over the linearised predictive, pred_type='glm': its Jacobians serve all precisions."
            )
        elif val_loader is None:
            raise ValueError("method='gridsearch' needs val_loader=, held-out data.")
        else:
            self.laplace.optimize_prior_precision(
                "gridsearch",
                bounds=(log_prior_prec_base**log_prior_prec_min, log_prior_prec_base**log_prior_prec_max),
                val_loader=Batches(val_loader, self.options.dict_key_y),
                loss=None if loss is None else self._of_distribution(loss),
                grid_size=grid_size,
                link_approx=LinkApprox(link_approx).value,
                n_samples=n_samples,
                progress_bar=progress_bar,
            )
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")

    def _by_evidence(self, n_steps: int, start: float | Tensor, structure: PriorStructure, progress_bar: bool) -> None:
        """The maximum of the evidence."""
        self.laplace.prior_precision = start
        precisions, tensors = torch.as_tensor(start).numel(), len(self.laplace.fitted.parameters.sizes)
        if precisions > 1:
            structure = PriorStructure.LAYERWISE if precisions == tensors else PriorStructure.DIAG
        self.laplace.optimize_prior_precision("marglik", structure.value, n_steps=n_steps, progress_bar=progress_bar)

    def _of_distribution(self, loss: Callable[..., Any]) -> Loss:
        """The reference's form of a loss, of numbers, as a loss of the predictive distribution."""

        def of_classes(predictive: Any, y: Tensor) -> Tensor:
            return torch.as_tensor(loss(predictive.probs, y))

        def of_numbers(predictive: Any, y: Tensor) -> Tensor:
            noise = self.sigma_noise**2 * torch.eye(predictive.mean.shape[-1]).to(predictive.mean)
            return torch.as_tensor(loss(predictive.mean, predictive.covariance_matrix - noise, y))

        return of_numbers if self.likelihood is Likelihood.REGRESSION else of_classes

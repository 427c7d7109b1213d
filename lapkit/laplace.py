"""The facade: a trained network in, a posterior over its weights out."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.backends import BACKENDS
from lapkit.calibration import Report
from lapkit.checkpoint import read_state
from lapkit.choices import CURVATURES, LIKELIHOODS, choice, curvature_structure
from lapkit.curvature import BradleyTerry, Columns, Gaussian, Likelihood
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.evaluation import evaluate
from lapkit.facade.predictions import Predictions
from lapkit.facade.storage import Storage
from lapkit.facade.tuning import Tuning
from lapkit.posteriors import GaussianPrior
from lapkit.posteriors.function_space.subset import Subset as SubsetOfData
from lapkit.subnetworks import SubnetworkMask
from lapkit.subsets import Subset


class Laplace(Tuning, Predictions, Storage):
    """A Laplace approximation of the posterior over a trained network's weights, `N(w*, (H + prior precision)^{-1})`.

    The network is borrowed: its weights, gradients, modes and buffers are after every call what they were before.

    Args:
        model: trained; maps a batch to outputs `(N, C)`, logits for classes.
        likelihood: "classification", "regression", "binary", "reward_modeling" (fitted to pairs of inputs, predicts the
            rewards of single ones, see `BradleyTerry`), or a `Likelihood` object.
        subset_of_weights: "last_layer", "all", names of parameters or modules, or "subnetwork": single weights. Frozen
            parameters (`requires_grad=False`) are left out.
        hessian_structure: "kron", "kron_reduce" (for networks that average over positions which share weights, as by
            global pooling), "ekfac" (kron's eigenvectors with eigenvalues that fit best, by two passes over the data),
            "diag", "blockdiag", "full", or "lowrank" (ViViT): the full matrix by its columns, `V V^T` with as
            many of them as there are examples times outputs, for more weights than a full matrix has room for. It is
            exact unless a rank is given. "gp" is "lowrank" in the space of the outputs, a Gaussian process with the
            tangent kernel, for any number of weights and few examples.
        sigma_noise: standard deviation of the observation noise, for "regression".
        prior_precision: one number, one for each parameter tensor, or one for each weight.
        prior_mean: a number or one for each weight.
        temperature: of the likelihood, `p(y|f)^(1/T)`.
        curvature: "ggn" (exact), "mc" (one Monte Carlo column), "ef" (empirical Fisher), or a `Columns` object.
        memory_budget: bytes that intermediates may take; a quarter of what is free by default.
        rank: of "lowrank": keep only so many columns, the nearest matrix of that rank batch by batch. What is left out
            makes the posterior wider, never narrower.
        per_parameter: of "lowrank": the diagonal blocks of single parameters, instead of the whole matrix.
        space: of "lowrank": "weights" writes V out, "functions" keeps the layers' inputs and cotangents and computes in
            the space of the outputs; "auto" takes whichever needs less memory.
        subnetwork: of "subnetwork": a mask of `lapkit.subnetworks`, or indices or a Boolean mask over the flat vector
            of the weights that require gradients. The posterior is the conditional one, the others staying at the mode:
            its precision has the rows and columns of these weights. Of "kron" and "ekfac" these are those of the
            factored matrix of the tensors that hold them; see `lapkit.curvature.principal`.
        last_layer_name: of "last_layer": the module, by default the one nearest to the outputs.
        subset_of_data: of "gp": condition on some of the examples alone: a number, drawn at random, or their places.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        backend: who computes the curvature of a fit: "lapkit", or, to check one by the other, the library "backpack" or
            "curvlinops", for what it can. Predictions run on lapkit's engine always.

    Raises:
        ValueError: if a name is unknown, a number is not positive, settings do not go together, or nothing can be
            trained.
        ImportError: if the backend's library is not installed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 2), torch.arange(60) % 3
        >>> la = Laplace(nn.Linear(2, 3), "classification", subset_of_weights="all", hessian_structure="full")
        >>> la.fit([(x, y)]).optimize_prior_precision().converged
        True
        >>> la(x[:5], link_approx="probit").sum(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])

    Reference:
        MacKay, 1992; Daxberger et al., Laplace Redux, 2021; Dangel, Backpropagation Beyond the Gradient, section 3.3.1.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        subset_of_weights: str | Iterable[str] = "last_layer",
        hessian_structure: str = "kron",
        *,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        curvature: str | Columns = "ggn",
        memory_budget: int | None = None,
        rank: int | None = None,
        per_parameter: bool = False,
        space: str = "auto",
        subnetwork: SubnetworkMask | Tensor | None = None,
        last_layer_name: str | None = None,
        subset_of_data: SubsetOfData | None = None,
        forward_fn: ForwardFunction | None = None,
        output_axis: int | None = None,
        backend: str = "lapkit",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
        wanted = subset_of_weights if isinstance(subset_of_weights, str) else tuple(subset_of_weights)
        self.subset_of_weights, self.subset = wanted, Subset(wanted, subnetwork, last_layer_name)
        if subset_of_data is not None and hessian_structure != "gp":
            raise ValueError(
                f"subset_of_data was given beside hessian_structure={hessian_structure!r}; it belongs to 'gp' only, "
                "whose cost grows with the data. Give other structures a loader of some of the data."
            )
        self.model = model
        self.likelihood = self._named_likelihood(likelihood, sigma_noise)
        self.structure = curvature_structure(hessian_structure, rank, per_parameter, space)
        if hessian_structure == "kron_reduce" and isinstance(self.likelihood, BradleyTerry):
            raise ValueError(
                "'kron_reduce' sums the gradients of whatever shares a weight, here of both rewards of a pair, which "
                "cancel: next to no curvature is left. Choose 'kron' or 'ekfac'."
            )
        self.prior = GaussianPrior(prior_precision, prior_mean)
        self.temperature = temperature
        self.columns = curvature if isinstance(curvature, Columns) else choice(CURVATURES, curvature, "curvature")
        self.memory_budget, self.subset_of_data = memory_budget, subset_of_data
        self.forward_fn, self.output_axis, self.backend = forward_fn, output_axis, backend
        choice(BACKENDS, backend, "backend").check(self.structure, self.likelihood, self.columns)
        self.subset.known(model)  # a subset that names nothing is an error now, not when data come
        self._fit = None
        self._sums = None
        self._likelihood_of_fit = self.likelihood  # with its noise then: sums of other settings do not add up
        self._subnetwork = None
        self._engine = None
        self._fitted_to = []
        self._posterior = None

    @staticmethod
    def _named_likelihood(likelihood: str | Likelihood, sigma_noise: float | Tensor) -> Likelihood:
        if isinstance(likelihood, Likelihood):
            chosen = likelihood
        else:
            kind = choice(LIKELIHOODS, likelihood, "likelihood")
            if kind is Gaussian:
                return Gaussian(sigma_noise)
            chosen = kind()
        if float(sigma_noise) != 1.0:
            raise ValueError(
                f"sigma_noise={float(sigma_noise):g} was given beside the likelihood {likelihood!r}; it belongs to "
                "'regression' only. A Gaussian object has its own noise, other likelihoods have none."
            )
        return chosen

    def __repr__(self) -> str:
        low, high = (float(edge) for edge in torch.as_tensor(self.prior.precision).aminmax())
        prior = f"prior precision {low:.4g}" + (f" to {high:.4g}" if high > low else "")
        about = "not fitted" if self._fit is None else f"{self.n_params} weights, {self._fit.count:g} examples, {prior}"
        what = f"{type(self.model).__name__}, {self.likelihood}, {self.subset}, {self.structure}"
        return f"{type(self).__name__}({what}; {about})"

    def evaluate(self, loader: Iterable[Any], **options: Any) -> Report:
        """How good and how honest predictions are, beside MAP, MAP recalibrated, and an ensemble.

        Args:
            loader: batches `(inputs, targets)` that nothing was trained or tuned on.
            options: `ood=`, `validation=` (for the temperature, or the spread), `ensemble=`, `link_approx=` and more of
                `lapkit.evaluation.evaluate`.

        Returns:
            The report: prints as a table, gives its numbers by `to_dict()` and a page by `save("report.html")`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            TypeError: if the likelihood is neither of classes nor Gaussian, or a batch has the wrong type.
            ValueError: if data or options do not fit.
        """
        return evaluate(self, loader, **options)

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module, **settings: Any) -> Laplace:
        """Read what `save` has written; nothing in the file is executed.

        Args:
            path: the file.
            model: the network that was fitted, with the weights that it had, on any device, where all goes.
            settings: arguments of the constructor that hold functions, such as `forward_fn` or a likelihood of one's
                own, which the file does not, and `memory_budget`.

        Returns:
            Fitted, with the hyper-parameters of that time.

        Raises:
            TypeError: if the model is no module, or the path is one.
            ValueError: if it is no file of a `Laplace`, of another version, or the model is not the one that was fitted
                or was trained since.
        """
        if isinstance(path, nn.Module):
            raise TypeError(f"Expected load(path, model), got the {type(path).__name__} in the place of the path.")
        # The constructor refuses a network of frozen weights, with which predictions are welcome.
        la = cls(nn.ParameterList([torch.zeros(1)]), **{"likelihood": "classification", **settings})
        la.model = model
        la.load_state_dict(read_state(path))
        return la

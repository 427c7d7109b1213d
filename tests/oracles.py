"""The slow truth: autograd and dense linear algebra, and nothing of lapkit.

Every number of lapkit is compared with one of these. They work one example at a time, so no batching can
hide an error, and they form every matrix, so they are for small problems only.
Shapes: N examples, C outputs, P parameters.
"""

import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev


def flat_parameters(model, names=None):
    """The named parameters (default: all) as one vector (P,), in the order of `parameters_to_vector`."""
    return torch.cat([p.detach().reshape(-1) for p in _selected(model, names).values()])


def jacobian(model, x, names=None):
    """J_n = d f(x_n) / d theta for every example alone, (N, C, P), columns ordered as `flat_parameters`.

    `x` is a tensor, or a tuple of tensors for a model of several arguments; the first axis is the example's.
    An output with more axes than (N, C) is flattened per example.
    """
    arguments = x if isinstance(x, tuple) else (x,)
    chosen = _selected(model, names)

    def outputs(parameters, *example):
        return functional_call(model, parameters, example).reshape(-1)

    def jacobian_of_one(n):
        # One output at a time: with more, jacrev runs the backward under vmap, where cdist's is wrong.
        blocks = jacrev(outputs, chunk_size=1)(chosen, *[a[n : n + 1] for a in arguments])
        return torch.cat([block.flatten(start_dim=1) for block in blocks.values()], dim=1)

    return torch.stack([jacobian_of_one(n) for n in range(len(arguments[0]))]).detach()


def output_hessian(loss_fn, f, y):
    """L_n = d^2 loss(f_n, y_n) / df_n^2 for every example alone, (N, C, C).

    `loss_fn` takes f_n (C,) and y_n and returns one number: the negative log-likelihood of that example.
    """
    return torch.stack([hessian(loss_fn)(f_n, y_n) for f_n, y_n in zip(f.detach(), y, strict=True)])


def ggn(J: Tensor, L: Tensor) -> Tensor:
    """H = sum_n J_n^T L_n J_n, (P, P), from J (N, C, P) and L (N, C, C)."""
    return sum(J_n.T @ L_n @ J_n for J_n, L_n in zip(J, L, strict=True))


def log_gaussian_evidence(log_likelihood, H, prior_diag, mean, prior_mean):
    """log p(y | mean) - 1/2 d^T P_0 d + 1/2 log det P_0 - 1/2 log det (H + P_0), d = mean - prior_mean.

    H is (P, P) and P_0 = diag(prior_diag). `prior_diag` and `prior_mean` are (P,) or one number.
    """
    prior_diag = torch.as_tensor(prior_diag, dtype=H.dtype).expand(len(H))
    scatter = (prior_diag * (mean - prior_mean) ** 2).sum()
    log_det_ratio = _log_det(H + torch.diag(prior_diag)) - prior_diag.log().sum()
    return log_likelihood - 0.5 * scatter - 0.5 * log_det_ratio


def predictive_covariance(J: Tensor, P: Tensor) -> Tensor:
    """J_n P^-1 J_n^T per example, (N, C, C), from J (N, C, P) and the posterior precision P (P, P)."""
    return torch.stack([J_n @ torch.linalg.solve(P, J_n.T) for J_n in J])


def _selected(model, names):
    """The chosen parameters by name, in the model's order. A misspelt name must not shrink the answer."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    unknown = set(names or ()) - set(parameters)
    assert not unknown, f"no such parameters: {sorted(unknown)}"
    return {name: p for name, p in parameters.items() if names is None or name in names}


def _log_det(matrix):
    """log det of a positive definite matrix. Cholesky refuses any other, which slogdet would let through."""
    return 2 * torch.linalg.cholesky(matrix).diagonal().log().sum()

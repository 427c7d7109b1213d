"""Laplace approximations written out with dense matrices, on two small networks, and nothing of lapkit.

`problem(kind, net)` has a network, data, and everything a Laplace approximation makes of them: one Jacobian an example
from autograd, the Hessian of the loss in the outputs, and for each structure the matrix it keeps. Shapes: N examples,
C outputs, P parameters.
"""

import copy
from contextlib import contextmanager
from functools import cache, cached_property

import oracles
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

KINDS = ("classification", "regression", "binary")
STRUCTURES = ("diag", "kron", "blockdiag", "full", "lowrank")
NETS = ("mlp", "cnn")

EXAMPLES = 13
OUTPUTS = {"classification": 3, "regression": 2, "binary": 2}

# Negative log likelihood of one example, without the dispersion of a Gaussian.
LOSSES = {
    "classification": lambda f, y: -Categorical(logits=f).log_prob(y),
    "regression": lambda f, y: (f - y).square().sum() / 2,
    "binary": lambda f, y: -Bernoulli(logits=f, validate_args=False).log_prob(y).sum(),
}


def problem(kind, net="mlp"):
    return _problem(kind, net)


@cache
def _problem(kind, net):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the first to ask may be a file that is being imported
    try:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Problem(kind, net)
    finally:
        torch.set_default_dtype(before)


class Problem:
    """Built once and shared by all tests, which may not change it; `fresh` is a copy to do as one likes with."""

    def __init__(self, kind, net):
        self.kind, outputs = kind, OUTPUTS[kind]
        if net == "mlp":
            layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, outputs)]
            self.x = torch.randn(EXAMPLES, 3)
            self.head = ["4.weight", "4.bias"]
        else:
            body = [nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 2, stride=2), nn.Tanh()]
            layers = [*body, nn.Flatten(), nn.Linear(12, outputs)]
            self.x = torch.randn(EXAMPLES, 1, 4, 4)
            self.head = ["5.weight", "5.bias"]
        self.model = nn.Sequential(*layers)
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.7)
        self.y = {
            "classification": torch.arange(EXAMPLES) % 3,
            "regression": torch.randn(EXAMPLES, outputs),
            "binary": torch.randint(2, (EXAMPLES, outputs)) * 1.0,
        }[kind]
        self.new_x = torch.randn(4, *self.x.shape[1:])
        self.all = [name for name, _ in self.model.named_parameters()]

    @property
    def fresh(self):
        return copy.deepcopy(self.model)

    @property
    def data(self):
        """Batches of unequal sizes."""
        return list(zip(self.x.split(5), self.y.split(5), strict=True))

    def subset(self, subset):
        return {"all": self.all, "last_layer": self.head}.get(subset, subset)

    # -- the dense matrices

    @cached_property
    def f(self):
        return self.model(self.x).detach()

    @cached_property
    def jacobian(self):
        return oracles.jacobian(self.model, self.x)

    @cached_property
    def new_jacobian(self):
        return oracles.jacobian(self.model, self.new_x)

    @cached_property
    def hessians(self):
        """Of the loss in the outputs, (N, C, C)."""
        return oracles.output_hessian(LOSSES[self.kind], self.f, self.y)

    @cached_property
    def kronecker_factors(self):
        return kronecker_factors(self.model, self.x, self.hessians)

    def columns(self, names):
        """Which columns of the Jacobian belong to the named parameters."""
        owner = [n for n, p in self.model.named_parameters() for _ in range(p.numel())]
        return torch.tensor([n in names for n in owner])

    def sizes(self, names=None):
        return [p.numel() for n, p in self.model.named_parameters() if n in (names or self.all)]

    def mean(self, names=None):
        return oracles.flat_parameters(self.model, names or self.all)

    def curvature(self, structure, names=None):
        """H of the loss, (P, P), with what the structure drops set to zero."""
        names = names or self.all
        J = self.jacobian[:, :, self.columns(names)]
        return self.keep(structure, oracles.ggn(J, self.hessians), names)

    def keep(self, structure, H, names=None):
        """The part of a dense matrix that a structure keeps. For kron the blocks of weights are replaced."""
        names = names or self.all
        if structure in ("full", "lowrank"):
            return H
        if structure == "diag":
            return H.diagonal().diag()
        blocks = []
        for name, block in zip(names, blocks_of(H, self.sizes(names)), strict=True):
            factored = structure == "kron" and name in self.kronecker_factors
            blocks.append(torch.kron(*self.kronecker_factors[name]) if factored else block)
        return torch.block_diag(*blocks)

    def eigenvectors(self, names=None):
        """Of the Kronecker structure, (P, P): `U_B (x) U_A` for weights, those of the exact block for biases.

        With them the means over eigenvectors of equal eigenvalues of each factor, whose choice is arbitrary, (P, P).
        """
        names = names or self.all
        bases, means = [], []
        for name, block in zip(names, blocks_of(self.curvature("blockdiag", names), self.sizes(names)), strict=True):
            factors = self.kronecker_factors.get(name, (block,))
            found = [torch.linalg.eigh(factor) for factor in factors]
            vectors = [f[1].contiguous() for f in found]
            equal = [(v[:, None] - v[None]).abs() < 1e-10 * v.max() for v, _ in found]
            mean = [e.double() / e.sum(1, keepdim=True) for e in equal]
            bases.append(torch.kron(*vectors) if len(vectors) == 2 else vectors[0])
            means.append(torch.kron(*mean) if len(mean) == 2 else mean[0])
        return torch.block_diag(*bases), torch.block_diag(*means)

    def prior_diagonal(self, delta, names=None):
        """One number, one a tensor or one a weight, as (P,)."""
        delta, sizes = torch.as_tensor(delta, dtype=torch.float64), self.sizes(names)
        if delta.numel() == len(sizes) and delta.numel() > 1:
            return torch.cat([d.expand(n) for d, n in zip(delta, sizes, strict=True)])
        return delta.expand(sum(sizes))

    def precision(self, structure, delta=1.0, noise=1.0, temperature=1.0, names=None):
        """P = H / (noise^2 temperature) + diag(delta).

        A Kronecker structure keeps its eigenvectors: of a prior that differs inside a block, the diagonal there.
        """
        prior = self.prior_diagonal(delta, names).diag()
        if structure == "kron":
            U, mean = self.eigenvectors(names)
            prior = U @ (mean @ (U.T @ prior @ U).diagonal()).diag() @ U.T
        return self.curvature(structure, names) / (noise**2 * temperature) + prior

    def log_likelihood(self, noise=1.0):
        if self.kind == "classification":
            return Categorical(logits=self.f).log_prob(self.y).sum()
        if self.kind == "binary":
            return Bernoulli(logits=self.f).log_prob(self.y).sum()
        return Normal(self.f, noise).log_prob(self.y).sum()

    def log_evidence(self, structure, delta=1.0, noise=1.0, temperature=1.0, names=None, prior_mean=0.0):
        prior = self.prior_diagonal(delta, names)
        H = self.precision(structure, delta, noise, temperature, names) - prior.diag()
        return oracles.log_gaussian_evidence(
            self.log_likelihood(noise) / temperature, H, prior, self.mean(names), prior_mean
        )

    def function_covariance(self, P, names=None):
        """J P^-1 J^T at the new inputs, (N, C, C)."""
        return oracles.predictive_covariance(self.new_jacobian[:, :, self.columns(names or self.all)], P)


def blocks_of(matrix, sizes):
    """The diagonal blocks of these sizes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [matrix[end - size : end, end - size : end] for end, size in zip(ends, sizes, strict=True)]


def kronecker_factors(model, x, hessians):
    """B = sum_n sum_t G_nt^T L_n G_nt and A = mean_n mean_t a_nt a_nt^T for each weight, by its name.

    G_nt is the Jacobian of the outputs in what a linear map or a convolution puts out at position t, a_nt what went
    in there. Row-major, the block of the weight is B (x) A.
    """
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, a, z, name=name: seen.__setitem__(name, (a[0].detach(), z)))
        for name, layer in layers.items()
    ]
    B, A = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    try:
        for x_n, L in zip(x, hessians, strict=True):
            f = model(x_n[None])[0]
            for name, layer in layers.items():
                a, z = seen[name]
                G = torch.stack([torch.autograd.grad(f_c, z, retain_graph=True)[0] for f_c in f])  # (C, 1, O, ...)
                G = G.flatten(3) if isinstance(layer, nn.Conv2d) else G[..., None]  # (C, 1, O, T)
                a = _patches(layer, a)  # (T, I)
                B[name] = B[name] + torch.einsum("ckt,cd,dlt->kl", G[:, 0], L, G[:, 0])
                A[name] = A[name] + a.T @ a / (len(x) * len(a))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (B[name].contiguous(), A[name].contiguous()) for name in layers}  # torch.kron wants it so


def _patches(layer, a):
    if isinstance(layer, nn.Linear):
        return a
    return F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T


@contextmanager
def untouched(model):
    """Assert that a model comes back as it was: weights, gradients, buffers, modes, flags, hooks and attributes."""
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        assert before.keys() == after.keys(), before.keys() ^ after.keys()
        changed = [key for key in before if not _same(before[key], after[key])]
        assert not changed, changed


def _state(model):
    state = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks")}
        state[name, "module"] = (type(module), module.training, sorted(plain), hooks)
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, t in tensors:
            state[kind, name] = (id(t), t.data_ptr(), t.requires_grad)
            state[kind, name, "value"] = t.detach().clone()
            state[kind, name, "grad"] = None if t.grad is None else t.grad.clone()
    return state


def _same(one, two):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return (
            one.dtype == two.dtype
            and one.shape == two.shape
            and bool(((one == two) | (one != one) & (two != two)).all())
        )
    return type(one) is type(two) and one == two

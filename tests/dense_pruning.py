"""Pruning of a quadratic with a dense matrix P and weights w, by its definitions and nothing of lapkit."""

import torch

from lapkit import Laplace


def minimiser(P, w, gone):
    """The change that zeroes some weights and raises `d^T P d / 2` least, by the whole Karush-Kuhn-Tucker system."""
    places = [int(i) for i in gone]
    constraint = torch.eye(len(w))[places]
    zero = torch.zeros(len(places), len(places))
    system = torch.cat([torch.cat([P, constraint.T], 1), torch.cat([constraint, zero], 1)])
    right = torch.cat([torch.zeros(len(w)), -w[places]])
    return torch.linalg.solve(system, right)[: len(w)]


def rise(P, change):
    return float(change @ P @ change) / 2


def evidence_fall(P, w, prior, group, mean=0.0):
    """Log evidence of `N(w, P^-1)` with the prior less that with the group fixed to zero, by two Gaussian integrals."""
    rest = [i for i in range(len(w)) if i not in set(group)]
    mean = torch.as_tensor(mean, dtype=w.dtype).expand(len(w))

    def log_integral(P, prior, mean, height):
        return height + (prior.log().sum() - torch.logdet(P)) / 2 if len(P) else height

    # log joint at its maximum, up to what both share; the prior's mean adds nothing that depends on the group but m'Dm
    shared = log_integral(P, prior, mean, torch.zeros(()))
    fixed = log_integral(P[rest][:, rest], prior[rest], mean, -rise(P, minimiser(P, w, group)))
    # fixing to zero takes the factor exp(-m_Q' D_Q m_Q / 2) of the prior out of the model
    group = list(group)
    return float(shared - fixed - (prior[group] * mean[group] ** 2).sum() / 2)


def one_by_one(P, w, prior, groups, count, score):
    """Greedy removals: at each, everything from scratch by the minimiser over what has gone and the candidate."""
    gone, dead = [], []
    for _ in range(count):
        costs = {}
        for u, group in enumerate(groups):
            if u not in gone:
                costs[u] = score(P, w, prior, dead, [i for i in group if i not in dead])
        best = min(costs, key=costs.get)
        gone.append(best)
        dead += [i for i in groups[best] if i not in dead]
    return gone


def obs_cost(P, w, prior, dead, group):
    both = rise(P, minimiser(P, w, dead + group)) if dead + group else 0.0
    return both - (rise(P, minimiser(P, w, dead)) if dead else 0.0)


def evidence_cost(P, w, prior, dead, group):
    both = evidence_fall(P, w, prior, dead + group) if dead + group else 0.0
    return both - (evidence_fall(P, w, prior, dead) if dead else 0.0)


def fitted(case, structure, subset="all", **options):
    options = {"prior_precision": 0.7} | options
    return Laplace(case.model, case.kind, subset, structure, **options).fit(case.data)

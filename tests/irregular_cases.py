"""Networks and batches whose examples stand in no regular order, and their Jacobians one example at a time."""

import torch
from networks.ragged import (
    cut_graph,
    cut_sequence,
    graph_network,
    graphs,
    joined_sequences,
    pooled_by_index,
    pooled_by_matrix,
    pooled_by_split,
    rectified,
    recurrent,
    sequences,
    shuffled,
    with_matrix,
)
from networks.routed import Picture, Words, experts_of, idle_experts, routed_tokens, top_1, top_2

SIZES = ((3, 3), (2, 4), (4, 1, 1), (5, 1, 2), (2,) * 9, (1, 3, 2, 2) * 3, (4, 2), (7,))
WITH_EMPTY = ((3, 0, 2), (4, 0), (0, 0, 4, 1))
LENGTHS = ((2, 2), (3, 1), (1, 3), (4, 2, 1), (1, 4, 2, 3, 1, 2, 4, 4, 2, 1))
SORTED = ((3, 3), (4, 3, 1), (4, 2, 2), (4, 4, 4), (4, 4, 3, 3, 2, 2, 2, 1, 1, 1))


def call(model, batch):
    """A tuple is not spread."""
    return model(batch)


def cut_rows(batch, n):
    return batch[n : n + 1]


def rows(*counts):
    return lambda: [torch.randn(n, 2) for n in counts]


def of_graphs(function, change=lambda batch: batch, sizes=SIZES):
    return graph_network(function), lambda: [change(graphs(*s)) for s in sizes], cut_graph


def of_sequences(build, lengths=LENGTHS, **options):
    return build, lambda: [sequences(*s, **options) for s in lengths], cut_sequence


CASES = {  # name: (model, batches one after the other, how to cut out one example)
    "top-1 experts": (top_1, rows(3, 8, 9, 70, 1, 5), cut_rows),
    "top-2 experts": (top_2, rows(3, 8, 9, 70, 1, 5), cut_rows),
    "routed tokens": (routed_tokens, lambda: [torch.randn(n, 5, 2) for n in (3, 9, 3, 1)], cut_rows),
    "experts that are run only where asked": (idle_experts, rows(3, 1, 9, 70, 1, 2), cut_rows),
    "experts for pictures": (experts_of(Picture), lambda: [torch.randn(n, 2, 3, 3) for n in (9, 4, 1, 12)], cut_rows),
    "experts for words": (experts_of(Words), lambda: [torch.randint(5, (n, 4)) for n in (9, 4, 1, 12)], cut_rows),
    "graphs, nodes in order": of_graphs(pooled_by_index),
    "graphs, nodes in any order": of_graphs(pooled_by_index, shuffled),
    "graphs of rectified nodes": of_graphs(rectified, shuffled),
    "graphs in a tuple": of_graphs(pooled_by_index, lambda batch: tuple(shuffled(batch).values())),
    "an empty graph": of_graphs(pooled_by_index, shuffled, WITH_EMPTY),
    "graphs split by size": of_graphs(pooled_by_split),
    "graphs pooled by a matrix": of_graphs(pooled_by_matrix, with_matrix),
    "packed sequences": of_sequences(recurrent(ordered=False)),
    "packed sequences, two layers": of_sequences(recurrent(ordered=False, layers=2)),
    "packed words": of_sequences(recurrent(ordered=False, embed=True), words=True),
    "packed sequences, sorted": of_sequences(recurrent(ordered=True), SORTED),
    "joined sequences": of_sequences(joined_sequences),
}


def slow(model, batch, cut):
    """Outputs `(N, C)` and Jacobian `(N, C, P)`, one example and one output at a time."""
    with torch.no_grad():
        examples = len(model(batch))
    weights, outputs, rows = [p for p in model.parameters() if p.requires_grad], [], []
    for n in range(examples):
        f = model(cut(batch, n))[0]
        gradients = [torch.autograd.grad(c, weights, retain_graph=True, materialize_grads=True) for c in f]
        outputs.append(f.detach())
        rows.append(torch.stack([torch.cat([part.flatten() for part in g]) for g in gradients]))
    return torch.stack(outputs), torch.stack(rows)

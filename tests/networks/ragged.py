"""Networks for examples of different sizes in one tensor: graphs and sequences, and how to cut one of them out."""

import torch
from networks.registry import Model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def pooled_by_index(m, batch):
    nodes, graph, count = (batch["nodes"], batch["graph"], batch["count"]) if isinstance(batch, dict) else batch
    h = m.two(m.one(nodes).tanh()).tanh()
    return m.head(h.new_zeros(len(count), h.shape[1]).index_add(0, graph, h))


def rectified(m, batch):
    """Some nodes have no active unit, so that nothing comes back to them; they went in all the same."""
    h = m.two(m.one(batch["nodes"]).relu()).relu()
    return m.head(h.new_zeros(len(batch["count"]), 3).index_add(0, batch["graph"], h))


def pooled_by_split(m, batch):
    h = m.two(m.one(batch["nodes"]).tanh()).tanh()
    return m.head(torch.stack([part.sum(0) for part in h.split(batch["count"].tolist())]))


def pooled_by_matrix(m, batch):
    h = m.two(m.one(batch["nodes"]).tanh()).tanh()
    return m.head(batch["member"] @ h)


def graph_network(function):
    return lambda: Model(function, one=nn.Linear(2, 3), two=nn.Linear(3, 3), head=nn.Linear(3, 2))


def graphs(*sizes, seed=0):
    """Nodes of graphs of these sizes, as a dictionary; the order of the nodes is random where `graph` says whose."""
    torch.manual_seed(seed)
    count = torch.tensor(sizes)
    graph = torch.arange(len(sizes)).repeat_interleave(count)
    return {"nodes": torch.randn(len(graph), 2), "graph": graph, "count": count}


def shuffled(batch):
    order = torch.randperm(len(batch["graph"]))
    return {**batch, "nodes": batch["nodes"][order], "graph": batch["graph"][order]}


def with_matrix(batch):
    count = len(batch["count"])
    return {"nodes": batch["nodes"], "member": (batch["graph"] == torch.arange(count)[:, None]).to(torch.float64)}


def cut_graph(batch, n):
    """Graph n by itself."""
    if isinstance(batch, tuple):
        return tuple(cut_graph(dict(zip(("nodes", "graph", "count"), batch, strict=True)), n).values())
    mine = batch["member"][n] > 0 if "member" in batch else batch["graph"] == n
    if "member" in batch:
        return {"nodes": batch["nodes"][mine], "member": batch["member"][n : n + 1, mine]}
    return {"nodes": batch["nodes"][mine], "graph": batch["graph"][mine] * 0, "count": batch["count"][n : n + 1]}


def packed(m, batch):
    """A recurrent layer over sequences without their padding, read at the end and everywhere."""
    z, lengths = batch
    z = m.embed(z) if z.ndim == 2 else z
    rows = pack_padded_sequence(z, lengths, batch_first=True, enforce_sorted=m.ordered)
    out, (last, _) = m.cell(rows)
    return m.head(pad_packed_sequence(out, batch_first=True)[0].sum(1).tanh() + last[-1])


def recurrent(*, ordered, layers=1, embed=False):
    def build():
        before = {"embed": nn.Embedding(5, 2)} if embed else {}
        cell = nn.LSTM(2, 3, layers, batch_first=True)
        return Model(packed, ordered=ordered, cell=cell, head=nn.Linear(3, 2), **before)

    return build


def sequences(*lengths, words=False):
    """Always padded to four positions, so that batches differ in nothing but the lengths."""
    shape = (len(lengths), 4)
    return torch.randint(5, shape) if words else torch.randn(*shape, 2), torch.tensor(lengths)


def cut_sequence(batch, n):
    """Sequence n by itself, without its padding."""
    return batch[0][n : n + 1, : int(batch[1][n])], batch[1][n : n + 1]


def joined(m, batch):
    """Padded sequences whose rows are put one after the other, and taken apart again."""
    z, lengths = batch
    rows = torch.cat([one[:length] for one, length in zip(z, lengths.tolist(), strict=True)])
    return m.head(torch.stack([part.sum(0) for part in m.one(rows).tanh().split(lengths.tolist())]))


def joined_sequences():
    return Model(joined, one=nn.Linear(2, 3), head=nn.Linear(3, 2))

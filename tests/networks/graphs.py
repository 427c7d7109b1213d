"""Graph networks: whole graphs are the examples, padded and dense, or as edge lists between all nodes of a batch."""

import torch
from torch import Tensor, nn


class DenseGCN(nn.Module):
    """Kipf and Welling 2017 on padded dense graphs: `relu(D^-1/2 (A + I) D^-1/2 H W + b)`, mean over nodes.

    Takes `(nodes (N, V, D), adjacency (N, V, V))`; empty nodes have no edges and features zero.
    """

    def __init__(self, inputs: int = 3, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(inputs, width, bias=False), nn.Linear(width, width, bias=False)
        self.bias = nn.ParameterList([nn.Parameter(torch.randn(width)) for _ in range(2)])
        self.head = nn.Linear(width, classes)

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:
        nodes, adjacency = graph
        looped = adjacency + torch.eye(adjacency.shape[-1], dtype=nodes.dtype)
        scale = looped.sum(-1).rsqrt()
        propagate = scale[:, :, None] * looped * scale[:, None, :]
        for layer, bias in zip((self.one, self.two), self.bias, strict=True):
            nodes = (propagate @ layer(nodes) + bias).relu()
        present = (adjacency.sum(-1, keepdim=True) > 0).to(nodes)
        return self.head((nodes * present).sum(1) / present.sum(1).clamp_min(1))


class SparseGIN(nn.Module):
    """Xu et al. 2019 with messages along edges: `mlp((1 + eps) h_v + sum_u h_u)`, sums over nodes.

    Takes `(nodes (N, V, D), edges (N, E, 2))` of graphs with equally many nodes; an edge from a node to itself is
    padding. All nodes of the batch become one long list, edges are looked up and summed by index.
    """

    def __init__(self, inputs: int = 3, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(i, width), nn.ReLU(), nn.Linear(width, width)) for i in (inputs, width)
        )
        self.eps = nn.Parameter(torch.tensor([0.1, -0.2]))
        self.head = nn.Linear(width, classes)

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:
        nodes, edges = graph
        examples, each = nodes.shape[:2]
        edges = (edges + each * torch.arange(examples)[:, None, None]).flatten(0, 1)
        source, target = edges[edges[:, 0] != edges[:, 1]].T
        h = nodes.flatten(0, 1)
        for eps, mlp in zip(self.eps, self.mlps, strict=True):
            h = mlp((1 + eps) * h + torch.zeros_like(h).index_add(0, target, h[source]))
        owner = torch.arange(examples).repeat_interleave(each)
        return self.head(h.new_zeros(examples, h.shape[1]).index_add(0, owner, h))


class RaggedGCN(nn.Module):
    """Graphs of different sizes in one list of nodes, as graph libraries batch them.

    Takes `nodes` `(V, D)`, `edges` `(E, 2)`, `graph` `(V,)`, the graph of each node, and `count`, `(N,)`, how many
    nodes each graph has.
    """

    def __init__(self, inputs: int = 3, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, classes)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, count: Tensor) -> Tensor:
        h, (source, target) = nodes, edges.T
        for layer in self.layers:
            h = layer(h)
            h = (h + torch.zeros_like(h).index_add(0, target, h[source])).tanh()
        pooled = h.new_zeros(len(count), h.shape[1]).index_add(0, graph, h)
        return self.head(pooled / count[:, None])


class GAT(nn.Module):
    """Velickovic et al. 2018, dense: attention over neighbours with raw attention vectors."""

    def __init__(self, inputs: int = 3, width: int = 4, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.heads, self.values = heads, nn.Linear(inputs, heads * width, bias=False)
        self.source, self.target = (nn.Parameter(torch.randn(heads, width)) for _ in range(2))
        self.head = nn.Linear(heads * width, classes)

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:
        nodes, adjacency = graph
        h = self.values(nodes).unflatten(-1, (self.heads, -1))  # (N, V, heads, D)
        score = (h * self.target).sum(-1)[:, :, None] + (h * self.source).sum(-1)[:, None]  # (N, V, V, heads)
        edge = (adjacency + torch.eye(adjacency.shape[-1], dtype=h.dtype) > 0)[..., None]
        weight = nn.functional.leaky_relu(score, 0.2).masked_fill(~edge, -1e9).softmax(2)
        return self.head(torch.einsum("nvuh,nuhd->nvhd", weight, h).flatten(2).relu().sum(1))

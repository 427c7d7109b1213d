"""The catalogue: every architecture with its inputs, and what the engine is known to do with it.

A case is narrow enough to be compared with a loop over examples and outputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import attention, graphs, mobile, recurrent, segmentation, vision
from networks.brute_force import rows
from torch import Tensor, nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        build: makes the network, in the default dtype.
        inputs: makes a batch of so many examples.
        generic: patterns of parameters that the engine differentiates by its generic path, without a closed form.
        tolerance: of comparisons; 1e-8 unless the network itself computes in a coarser type.
        requires: packages without which the case cannot be built.
        cut: makes some of the examples of a batch a batch.
        dtype: the default type while the network is built and run.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs
    generic: tuple[str, ...] = ()
    tolerance: float = 1e-8
    requires: tuple[str, ...] = ()
    cut: Callable[[Any, slice], Any] = rows
    dtype: torch.dtype = torch.float64

    def is_generic(self, name: str) -> bool:
        """Whether the parameter is expected on the generic path."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.generic)

    def outputs(self, model: nn.Module, x: Any) -> Tensor:
        """`(N, C)` or `(N, T, C)`, classes last, positions flattened."""
        f = model(**x) if isinstance(x, dict) else model(x)
        f = f if isinstance(f, Tensor) else f.logits
        return f.movedim(1, -1).flatten(1, -2) if f.ndim > 3 else f


CASES: dict[str, Case] = {}


def images(*shape: int) -> Inputs:
    return lambda n: torch.randn(n, *shape)


def settled(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """In eval mode, with norms as after training: fresh scales of one and shifts of zero would hide errors."""

    def make() -> nn.Module:
        model = build().eval()
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
        return model

    return make


def add(name: str, build: Callable[[], nn.Module], inputs: Inputs, **options: Any) -> None:
    CASES[name] = Case(settled(build), inputs, **options)


def language(name: str, *arguments: str) -> Callable[[], nn.Module]:
    """A network of `networks.language`, which is imported when it is built: transformers and peft are optional."""

    def build() -> nn.Module:
        from networks import language as models

        return getattr(models, name)(*arguments)

    return build


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10), nn.Sigmoid(), nn.Linear(10, 3))


def graph_inputs(examples: int) -> tuple[Tensor, Tensor]:
    """Random graphs of two to four nodes, padded to four."""
    adjacency = (torch.rand(examples, 4, 4) < 0.6).to(torch.get_default_dtype()).triu(1)
    adjacency[:, 0, 1] = 1.0
    present = torch.arange(4) < 2 + torch.arange(examples)[:, None] % 3
    adjacency = adjacency * (present[:, None] & present[:, :, None])
    return torch.randn(examples, 4, 3) * present[:, :, None], adjacency + adjacency.mT


def edge_inputs(examples: int) -> tuple[Tensor, Tensor]:
    """Four nodes and six edges each, of which some are padding."""
    return torch.randn(examples, 4, 3), torch.randint(4, (examples, 6, 2))


def ragged_inputs(examples: int) -> dict[str, Tensor]:
    """Graphs of two to four nodes on a line, one after the other in one list."""
    count = 2 + torch.arange(examples) % 3
    graph = torch.arange(examples).repeat_interleave(count)
    line = torch.arange(len(graph) - 1)
    line = line[graph[:-1] == graph[1:]]
    edges = torch.stack([torch.cat([line, line + 1]), torch.cat([line + 1, line])], 1)
    return {"nodes": torch.randn(len(graph), 3), "edges": edges, "graph": graph, "count": count}


def graphs_of(x: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """Some of the graphs of `ragged_inputs`, numbered anew."""
    chosen = torch.arange(len(x["count"]))[part]
    kept = torch.isin(x["graph"], chosen)
    edges = x["edges"][kept[x["edges"][:, 0]]] - x["count"][: part.start].sum()
    return {
        "nodes": x["nodes"][kept],
        "edges": edges,
        "graph": x["graph"][kept] - part.start,
        "count": x["count"][part],
    }


def tokens(examples: int) -> Tensor:
    """Sequences of five tokens without padding."""
    return torch.randint(3, 17, (examples, 5))


def padded(examples: int) -> dict[str, Tensor]:
    """A tokenizer's output: padding at the end of all but the first sequence, and the mask that says so."""
    mask = (torch.arange(5) < 5 - torch.arange(examples)[:, None] % 3).long()
    return {"input_ids": tokens(examples) * mask, "attention_mask": mask}


def encoded_and_decoded(examples: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(examples), "decoder_input_ids": tokens(examples)[:, :3]}


def sentences(examples: int) -> Tensor:
    """Token numbers, 0 at the end of all but the first."""
    tokens = torch.randint(1, 7, (examples, 4))
    return tokens * (torch.arange(4) < 4 - torch.arange(examples)[:, None] % 3)


add("mlp", perceptron, images(4, 4))
add("3c3d", vision.net_3c3d, images(3, 32, 32))
add("all-cnn-c", vision.all_cnn_c, images(3, 10, 10))
add("resnet basic", vision.resnet, images(3, 9, 9))
add("resnet bottleneck", lambda: vision.resnet(3, deep=True), images(3, 14, 14))
add("convnext", mobile.convnext, images(3, 16, 16))
add("mobilenet v3", mobile.mobilenet_v3, images(3, 9, 9))
add("efficientnet", mobile.efficientnet, images(3, 9, 9))
add("densenet", vision.densenet, images(3, 8, 8))
add("u-net", segmentation.UNet, images(1, 4, 4))
add("vit", attention.ViT, images(3, 8, 8))
add("vit by hand", lambda: attention.ViT(fused=False), images(3, 8, 8))
add("swin", attention.Swin, images(3, 8, 8))
add("mixer", attention.Mixer, images(3, 8, 8))

add("lstm", lambda: recurrent.Recurrent(nn.LSTM(3, 4, batch_first=True)), images(4, 3))
add("lstm state", lambda: recurrent.Recurrent(nn.LSTM(3, 4, 2, bidirectional=True), read="state"), images(4, 3))
add("lstm projected", lambda: recurrent.Recurrent(nn.LSTM(3, 4, proj_size=2), read="mean"), images(4, 3))
add("lstm outputs", lambda: recurrent.Recurrent(nn.LSTM(3, 4, batch_first=True), read="outputs"), images(4, 3))
add(
    "gru", lambda: recurrent.Recurrent(nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), read="mean"), images(4, 3)
)
add("gru state", lambda: recurrent.Recurrent(nn.GRU(3, 4, 2, bidirectional=True), read="state"), images(4, 3))
add("gru outputs", lambda: recurrent.Recurrent(nn.GRU(3, 4), read="outputs"), images(4, 3))
add("rnn", lambda: recurrent.Recurrent(nn.RNN(3, 4, batch_first=True), read="state"), images(4, 3))
add("lstm cell", lambda: recurrent.Unrolled(nn.LSTMCell(3, 4)), images(4, 3))
add("gru cell", lambda: recurrent.Unrolled(nn.GRUCell(3, 4)), images(4, 3))
add("packed lstm", recurrent.Tagger, sentences)
# Single precision is where oneDNN's fused kernel would be taken, all steps in one node.
FUSED = {"dtype": torch.float32, "tolerance": 1e-4}
add("fused lstm", lambda: recurrent.Recurrent(nn.LSTM(3, 4, batch_first=True)), images(4, 3), **FUSED)
add("fused packed lstm", recurrent.Tagger, sentences, **FUSED)
add("state space", recurrent.Selective, images(4, 4), generic=("log_decay",))

add("gcn", graphs.DenseGCN, graph_inputs)
add("gat", graphs.GAT, graph_inputs)
add("gin", graphs.SparseGIN, edge_inputs)
add("ragged gcn", graphs.RaggedGCN, ragged_inputs, cut=graphs_of)

HF = {"requires": ("transformers", "peft")}
# These compute their norms in float32 whatever the type of the weights.
HF32 = {**HF, "tolerance": 1e-5}
for kernel in ("sdpa", "eager"):
    add(f"gpt-2 {kernel}", language("gpt2", kernel), tokens, **HF)
    add(f"gpt-2 classifier {kernel}", language("gpt2_classifier", kernel), padded, **HF)
    add(f"bert {kernel}", language("bert", kernel), padded, **HF)
    add(f"bert masked tokens {kernel}", language("masked_bert", kernel), padded, **HF)
    add(f"distilbert {kernel}", language("distilbert", kernel), padded, **HF)
    add(f"albert {kernel}", language("albert", kernel), padded, **HF)
    add(f"llama {kernel}", language("llama", kernel), tokens, **HF32)
    add(f"llama with lora {kernel}", language("llama_with_lora", kernel), padded, **HF32)
    add(f"gpt-2 with lora {kernel}", language("gpt2_with_lora", kernel), padded, **HF)
add("t5", language("t5"), encoded_and_decoded, **HF32)
add("mixtral", language("mixtral"), tokens, **HF32)
add("mixtral batched", language("mixtral", "sdpa", "batched_mm"), tokens, **HF32)
add("qwen moe", language("qwen_moe", "eager"), padded, **HF32)
# Their kernels want float32, so that both sides of a comparison are rounded to seven digits an operation.
SINGLE = {**HF, "dtype": torch.float32, "tolerance": 1e-4}
add("mixtral grouped", language("mixtral", "sdpa", "grouped_mm"), tokens, **SINGLE)
add("qwen moe grouped", language("qwen_moe", "eager", "grouped_mm"), padded, **SINGLE)
add("mamba", language("mamba"), tokens, **SINGLE, generic=("*.A_log",))

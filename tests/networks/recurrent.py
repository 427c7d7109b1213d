"""Recurrent networks, read through their outputs or their last states."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class Recurrent(nn.Module):
    """A fused cell and a linear head.

    Args:
        cell: an `nn.RNNBase`.
        classes: number of outputs.
        read: "outputs" of every step (N, T, C), their "mean", the "last" one, or the final "state" of all layers.
    """

    def __init__(self, cell: nn.RNNBase, classes: int = 3, read: str = "last") -> None:
        super().__init__()
        self.cell, self.read = cell, read
        directions = 1 + cell.bidirectional
        width = (cell.proj_size or cell.hidden_size) * directions * (cell.num_layers if read == "state" else 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D), or (T, N, D) inside a cell that is not batch_first
        if not self.cell.batch_first:
            x = x.transpose(0, 1)
        outputs, state = self.cell(x)
        if not self.cell.batch_first:
            outputs = outputs.transpose(0, 1)
        if self.read == "state":
            hidden = state[0] if isinstance(state, tuple) else state  # (layers directions, N, H)
            return self.head(hidden.transpose(0, 1).flatten(1))
        if self.read == "outputs":
            return self.head(outputs)
        return self.head(outputs.mean(1) if self.read == "mean" else outputs[:, -1])


class Unrolled(nn.Module):
    """A cell called once a step from Python."""

    def __init__(self, cell: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Tagger(nn.Module):
    """Padded sequences of different lengths, packed so that no step is spent on padding."""

    def __init__(self, width: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width, padding_idx=0)
        self.cell, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, T) of tokens, 0 at the end of short ones
        lengths = (x != 0).sum(1)
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.cell(packed)[1][0][0])


class Selective(nn.Module):
    """A gated linear recurrence whose decay depends on the input, as state-space models have it."""

    def __init__(self, width: int = 4, state: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(width, 2 * width), nn.Linear(width, classes)
        self.filter = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.select = nn.Linear(width, 1 + 2 * state)
        self.step = nn.Linear(1, width)
        self.log_decay, self.skip = nn.Parameter(torch.randn(width, state)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D)
        x, gate = self.enter(x).chunk(2, -1)
        x = nn.functional.silu(self.filter(x.transpose(1, 2))[..., :-2].transpose(1, 2))
        step, into, out = self.select(x).split([1, self.log_decay.shape[1], self.log_decay.shape[1]], -1)
        step = nn.functional.softplus(self.step(step))[..., None]  # (N, T, D, 1)
        decay = torch.exp(-step * self.log_decay.exp())  # (N, T, D, S)
        drive = step * into[:, :, None] * x[..., None]
        state, outputs = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            outputs.append((state * out[:, t, None]).sum(-1))
        return self.head((torch.stack(outputs, 1) + self.skip * x) * nn.functional.silu(gate)).mean(1)

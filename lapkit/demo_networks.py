"""The networks of the demo: small, and trained until they know their noisy digits by heart."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from tqdm import tqdm

from lapkit.datasets import Digits

BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 5e-3, 3e-4


def network(classes: int) -> nn.Sequential:
    """A convolutional network with 2,552 weights for 8 classes of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def train(model: nn.Module, data: Digits, *, epochs: int, seed: int, progress_bar: bool = True) -> None:
    """Adam, one cycle, hardly any weight decay: a network that has learnt its noisy training digits by heart."""
    device = next(model.parameters()).device
    x, y = data.train_x.to(device), data.train_y.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = _optimizer(list(model.parameters()), len(x), epochs)
    bar = tqdm(range(epochs), desc="training", disable=not progress_bar, leave=False)
    for _ in bar:
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def train_together(
    models: Sequence[nn.Module], data: Digits, *, epochs: int, seeds: Sequence[int], progress_bar: bool = True
) -> None:
    """What `train` does to each of several networks of one architecture, with its own seed, in the time of one or two.

    The weights are stacked and the gradients taken by `torch.func.vmap`: small networks leave a core idle otherwise.

    Args:
        models: on one device; trained in place.
        data: to train on.
        epochs: passes over them.
        seeds: of the order of each network's batches.
        progress_bar: show progress.
    """
    weights, _ = stack_module_state(list(models))
    device = next(iter(weights.values())).device
    x, y = data.train_x.to(device), data.train_y.to(device)
    shell = copy.deepcopy(models[0])

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(shell, w, (x,)), y)

    slopes = vmap(grad(loss))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    optimizer, schedule = _optimizer(list(weights.values()), len(x), epochs)
    for _ in tqdm(range(epochs), desc="ensemble", disable=not progress_bar, leave=False):
        order = torch.stack([torch.randperm(len(x), generator=generator) for generator in generators]).to(device)
        for index in order.split(BATCH, dim=1):
            for name, slope in slopes(weights, x[index], y[index]).items():
                weights[name].grad = slope
            optimizer.step()
            schedule.step()
    for number, model in enumerate(models):
        model.load_state_dict({name: weight[number].detach() for name, weight in weights.items()})


def _optimizer(
    weights: Sequence[Tensor], examples: int, epochs: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-examples // BATCH)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)

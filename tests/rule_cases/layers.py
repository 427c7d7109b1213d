"""Convolutions and normalisations."""

from collections import Counter

import torch
from networks.registry import Model, gaussian
from rule_cases.registry import CASES, case, head, parameter, randomised
from torch import nn


def convolution(name, layer, *shape, features):
    CASES[name] = (lambda: (head(layer(), features=features), gaussian(*shape))), Counter(ConvolutionBackward0=2)


convolution("conv1d", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), 2, 7, features=12)
convolution("conv2d", lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), 4, 5, 5, features=36)
convolution("conv3d", lambda: nn.Conv3d(2, 2, (2, 3, 2), padding=(0, 1, 1)), 2, 3, 3, 2, features=36)
convolution("conv2d_depthwise", lambda: nn.Conv2d(3, 6, 2, groups=3), 3, 3, 3, features=24)
convolution("transposed1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), 2, 4, features=30)
convolution(
    "transposed2d",
    lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2),
    *(4, 3, 2),
    features=252,
)
convolution(
    "transposed2d_dilated",
    lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1, output_padding=2, dilation=3),
    *(2, 3, 3),
    features=192,
)
convolution("transposed2d_depthwise", lambda: nn.ConvTranspose2d(3, 6, 3, padding=1, groups=3), 3, 3, 3, features=54)
convolution("transposed3d", lambda: nn.ConvTranspose3d(2, 2, (2, 1, 2), stride=(1, 2, 2)), 2, 2, 2, 2, features=72)


@case(NativeLayerNorm=2)
def layer_norm():
    return head(nn.LayerNorm(4), features=4), gaussian(4)


@case(NativeLayerNorm=2)
def layer_norm_over_two_axes_of_a_sequence():
    return head(nn.LayerNorm((3, 4)), features=24), gaussian(2, 3, 4)


@case(NativeLayerNorm=2)
def layer_norm_time_major():
    return Model(lambda m, x: m.norm(x.transpose(0, 1)).tanh().sum(0), norm=randomised(nn.LayerNorm(4))), gaussian(5, 4)


@case(NativeLayerNorm=1)
def layer_norm_without_shift():
    return head(nn.LayerNorm(4, bias=False), features=8), gaussian(2, 4)


@case(Mul=1)
def rms_norm_composed():
    return head(nn.RMSNorm(4), features=8), gaussian(2, 4)


@case(Mul=1)
def rms_norm_by_hand():
    return Model(
        lambda m, x: (m.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))).sin().sum(1), w=parameter(4)
    ), gaussian(3, 4)


@case(NativeGroupNorm=2)
def group_norm():
    return head(nn.GroupNorm(2, 4), features=24), gaussian(4, 3, 2)


@case(NativeGroupNorm=2)
def group_norm_of_vectors():
    return head(nn.GroupNorm(2, 4), features=4), gaussian(4)


def with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


@case(NativeBatchNorm=2)
def batch_norm_1d():
    return head(with_statistics(nn.BatchNorm1d(4)), features=4), gaussian(4)


@case(NativeBatchNorm=2)
def batch_norm_3d():
    return head(with_statistics(nn.BatchNorm3d(2)), features=24), gaussian(2, 2, 3, 2)


@case(Repeat=2)
def instance_norm():
    return head(nn.InstanceNorm2d(2, affine=True), features=12), gaussian(2, 3, 2)


@case(Repeat=2)
def instance_norm_with_running_statistics():
    return head(with_statistics(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)), features=6), gaussian(
        2, 3
    )

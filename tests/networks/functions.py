"""Functions with derivatives of their own, some of which are wrong or cannot be mapped over."""

import torch


class NoBatch(torch.autograd.Function):
    """The square, whose derivatives look at numbers and so cannot be mapped over."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return NoBatchProduct.apply(g, x)


class NoBatchProduct(torch.autograd.Function):
    """`2 g x`."""

    @staticmethod
    def forward(g, x):
        return 2 * g * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, h):
        g, x = ctx.saved_tensors
        assert float(h.sum()) == float(h.sum())
        return 2 * h * x, 2 * h * g

    @staticmethod
    def vmap(info, in_dims, g, x):
        """Wrong by a factor."""
        return 4 * g * x, in_dims[0]


class WrongForward(torch.autograd.Function):
    """The square, whose derivative in forward mode is wrong."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x

    @staticmethod
    def jvp(ctx, v):
        (x,) = ctx.saved_tensors
        return 2.001 * v * x

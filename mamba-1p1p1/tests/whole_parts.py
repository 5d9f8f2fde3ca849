"""Parameters of whole mixers of any sizes, and how their operators are compared."""

import torch
from mamba_ssm.kernels.arguments import Direction, Ends, Projections, Taps


class Parts:
    """Parameters of a mixer of some sizes, and what the operators take of them."""

    def __init__(self, width=20, dim=40, rank=3, dstate=5, taps=4, optional=True):
        generator = torch.Generator().manual_seed(width + dim + rank + dstate + taps)

        def rand(*shape, scale=1.0):
            return torch.randn(shape, generator=generator) * scale

        def maybe(*shape):
            return rand(*shape) if optional else None

        scale = width**-0.5
        self.width = width
        self.ends = Ends(rand(2 * dim, width, scale=scale), maybe(2 * dim), rand(width, dim, scale=scale), maybe(width))
        self.norm = (rand(dim), maybe(dim), 1e-5) if optional else (None, None, 0.0)
        self.taps, self.projections, self.directions = [], [], []
        for reverse in (False, True):
            weight, bias, D = rand(dim, taps, scale=0.5), maybe(dim), rand(dim)
            x_proj, dt_proj = rand(rank + 2 * dstate, dim, scale=dim**-0.5), rand(dim, rank)
            dt_bias, A_log = rand(dim) - 1, rand(dim, dstate)
            self.taps.append(Taps(weight, bias, D))
            self.projections.append(Projections(x_proj, dt_proj, dt_bias, A_log))
            tensors = weight, bias, x_proj, dt_proj, dt_bias if optional else None, A_log, D if optional else None
            self.directions.append(Direction(*tensors, reverse))

    def tokens(self, *shape):
        return torch.randn(*shape, self.width, generator=torch.Generator().manual_seed(sum(shape)))


def double(given):
    """All tensors of nested tuples and lists in float64."""
    if isinstance(given, torch.Tensor):
        return given.double()
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*map(double, given))
    return type(given)(map(double, given)) if isinstance(given, (tuple, list)) else given


def assert_same(found, wanted, within=1e-5):
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=within * wanted.abs().max().item())


def gradients(call, given, dout):
    """Of every tensor in `given`, nested, through `call`."""
    leaves = []

    def wanted(part):
        if isinstance(part, torch.Tensor):
            leaves.append(part.detach().requires_grad_())
            return leaves[-1]
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(wanted, part))
        return type(part)(map(wanted, part)) if isinstance(part, (tuple, list)) else part

    return torch.autograd.grad(call(*wanted(given)), leaves, dout)

"""A new operator in one file: the running mean of a sequence, with everything that torch asks of an operator.

python -m examples.new_operator                     # checks it as the tests do
"""

import torch
from causal_conv1d.checks import check_dtype, check_ndim, check_tensor
from causal_conv1d.registration import Operators
from torch import Tensor


def running_mean_fn(x: Tensor) -> Tensor:
    """The mean of each step and all before it: x (batch, dim, seqlen), float32 or float64 -> the same.

    Raises:
        ValueError: another shape. TypeError: not a tensor, or another dtype.
    """
    check_tensor("x", x)
    check_ndim("x", x, "(batch, dim, seqlen)")
    check_dtype("x", x, (torch.float32, torch.float64))
    return torch.ops.example.running_mean(x)


def running_mean_ref(x: Tensor) -> Tensor:
    """What `running_mean_fn` computes, one step at a time."""
    return torch.stack([x[..., : step + 1].mean(-1) for step in range(x.shape[-1])], dim=-1)


def _counts(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)


def _kernel(x: Tensor) -> Tensor:
    return x.cumsum(-1) / _counts(x)


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    """The gradient wants nothing of x but its shape."""


def _differentiate(ctx, dout: Tensor) -> Tensor:
    return (dout / _counts(dout)).flip(-1).cumsum(-1).flip(-1)


OPERATORS = Operators("example")
OPERATORS.register("running_mean(Tensor x) -> Tensor", _kernel, _fake, save=_save, differentiate=_differentiate)


def check() -> None:
    """Value and gradient against the reference; schema, fake and gradient against torch's rules."""
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(running_mean_fn(x), running_mean_ref(x))
    torch.autograd.gradcheck(running_mean_fn, (x,))
    torch.library.opcheck(torch.ops.example.running_mean.default, (x,))
    compiled = torch.compile(running_mean_fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), running_mean_ref(x))


if __name__ == "__main__":
    check()

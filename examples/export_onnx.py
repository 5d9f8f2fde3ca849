"""Write a model as ONNX: `python -m examples.export_onnx vim_tiny_patch16_224 vim.onnx` (wants onnx and onnxscript).

ONNX does not know this project's operators, so they are spelt in operators that it knows: the scan's recurrence by
doubling, log2(seqlen) steps on the whole sequence. DyVM's block pruning stays behind: how many images a
scan gets there depends on the images.
"""

from __future__ import annotations

import argparse
import math
import sys

import timm
import torch
from mamba_ssm.kernels.torch import norm_forward
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F

import models_mamba  # noqa: F401 - registers the models


def plain_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_ssm::selective_scan` with input-dependent B, C (B, groups, dstate, L) in plain torch, by doubling.

    After k steps `states` holds what the last 2^k inputs made of the state, and `decays` what is left of one from 2^k
    steps before.
    """
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = (F.softplus(delta) if delta_softplus else delta).unsqueeze(2)
    B, C = (matrix.repeat_interleave(u.shape[1] // matrix.shape[1], 1) for matrix in (B, C))
    decays, states = torch.exp(dt * A.unsqueeze(-1)), dt * B * u.unsqueeze(2)  # (B, dim, dstate, L)
    length = u.shape[2]
    for step in range(math.ceil(math.log2(length))):
        shift = 2**step
        earlier, pad = (slice(shift, None), (0, shift)) if reverse else (slice(None, length - shift), (shift, 0))
        states = states + decays * F.pad(states[..., earlier], pad)
        decays = decays * F.pad(decays[..., earlier], pad)
    y = (states * C).sum(2)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return y, states[..., 0 if reverse else -1], u.new_empty(0)


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """`causal_conv1d::forward` in plain torch."""
    before = weight.shape[1] - 1
    weight, pad = (weight.flip(1), (0, before)) if reverse else (weight, (before, 0))
    out = F.conv1d(F.pad(x, pad), weight.unsqueeze(1), bias, groups=x.shape[1])
    return F.silu(out) if silu else out


def plain_argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    """A stable argsort as ONNX has it: its TopK gives equal values in their order."""
    return torch.topk(x, x.shape[dim], dim, largest=descending, sorted=True).indices


def plain_program(model: torch.nn.Module, images: Tensor) -> ExportedProgram:
    """`torch.export` of `model` in eval mode, with this project's operators spelt in torch's own."""
    spelt = {
        torch.ops.mamba_ssm.selective_scan.default: plain_scan,
        torch.ops.mamba_ssm.add_norm.default: norm_forward,
        torch.ops.causal_conv1d.forward.default: plain_convolution,
        torch.ops.aten.argsort.stable: plain_argsort,
    }
    return torch.export.export(model.eval(), (images,)).run_decompositions(spelt)


def main(argv: list[str] | None = None) -> int:
    """Export one registry model; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a model as ONNX.")
    parser.add_argument("model", help="registry name")
    parser.add_argument("file", help="what to write")
    parser.add_argument("--checkpoint", default="", help="weights to load, as timm's create_model takes them")
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args(argv)
    model = timm.create_model(args.model, checkpoint_path=args.checkpoint)
    images = torch.randn(args.batch_size, *model.default_cfg["input_size"])
    torch.onnx.export(plain_program(model, images), (images,), args.file, external_data=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Multiply-adds of one image through a model, counted two ways.

*Published* is the convention of the DyVM release, whose figures other papers quote: of the two scan directions only one
is counted. *Full* counts every direction that runs. Both count linears, the patch convolution, the mixers' convolutions
with their padding and, for a scan over G positions of d_inner channels with d_state states, 9 * d_inner * d_state * G
plus d_inner for each token's skip D and gate z; norms, activations and the heads that skip directions are left out.
Where directions are skipped, both multiply by the share that runs: the model's target, or what was measured.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from fusion.dynamic_pruning import DynamicPruning
from models_mamba import VisionMamba


class Flops(NamedTuple):
    """Multiply-adds of one image, in both conventions."""

    published: int
    full: int


class LayerLengths(NamedTuple):
    """What a mixer sees of one image: `tokens` through its projections and convolutions, `scanned` positions through
    its scans (fewer where tokens are pooled)."""

    tokens: int
    scanned: int


def model_flops(
    model: nn.Module, img_size: int | tuple[int, int] | None = None, block_keep: float | Tensor | None = None
) -> Flops:
    """Multiply-adds of one image (3, *img_size) through any timm model in inference.

    `block_keep` is the share of scan directions that run, one number or (depth, directions); by default the model's own
    target. A model that is not a `VisionMamba` is counted by `traced_flops`, which knows one convention.
    """
    if not isinstance(model, VisionMamba):
        count = sum(traced_flops(model, img_size).values())
        return Flops(count, count)
    outside, lengths = _dry_run(model, img_size)
    pruning = model.methods.pruning
    if block_keep is None:
        block_keep = pruning.block_keep_ratio if pruning is not None and pruning.blocks else 1.0
    directions = len(model.layers[0].mixer.directions)
    keep = torch.as_tensor(block_keep, dtype=torch.float64).cpu().expand(model.depth, directions)
    published = full = float(outside)
    for layer, seen, share in zip(model.layers, lengths, keep):
        mixer = layer.mixer
        projections = 3 * mixer.d_inner * mixer.d_model * seen.tokens
        published += projections + _direction_flops(mixer, seen) * float(share.mean())
        full += projections + _direction_flops(mixer, seen) * float(share.sum())
    return Flops(round(published), round(full))


def _direction_flops(mixer: nn.Module, seen: LayerLengths) -> int:
    """One direction of a mixer: convolution with its padding, x_proj, dt_proj, scan with D and z."""
    inner, rank, states = mixer.d_inner, mixer.dt_rank, mixer.d_state
    convolution = inner * mixer.d_conv * (seen.tokens + mixer.d_conv - 1)
    scan = inner * (rank + 2 * states) + rank * inner + 9 * inner * states
    return convolution + scan * seen.scanned + 2 * inner * seen.tokens


def _dry_run(model: VisionMamba, img_size: int | tuple[int, int] | None) -> tuple[int, list[LayerLengths]]:
    """One image through `model` without arithmetic: multiply-adds of what lies outside the mixers, and each layer's
    lengths."""
    outside, tokens, scanned = 0, {}, {}
    mixers = {layer.mixer: number for number, layer in enumerate(model.layers)}
    inside = {module for mixer in mixers for module in mixer.modules()}

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal outside
        outside += out.numel() * module.weight[0].numel()

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens[mixers[module]] = args[0].shape[1]

    def see_scan(number: int) -> Any:
        return lambda module, args: scanned.update({number: args[0].shape[1]})

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and module not in inside:
                stack.enter_context(_hooked(module.register_forward_hook(count)))
        for mixer, number in mixers.items():
            stack.enter_context(_hooked(mixer.register_forward_pre_hook(see)))
            stack.enter_context(_hooked(mixer.x_proj.register_forward_pre_hook(see_scan(number))))
        stack.enter_context(_plain_inference(model))
        tensors = [*model.named_parameters(), *model.named_buffers()]
        shapes = {name: tensor.detach().to("meta") for name, tensor in tensors}
        torch.func.functional_call(model, shapes, (_image(model, img_size, device="meta"),))
    return outside, [LayerLengths(tokens[number], scanned[number]) for number in range(model.depth)]


def _image(model: nn.Module, img_size: int | tuple[int, int] | None, **kwargs: Any) -> Tensor:
    embed = getattr(model, "patch_embed", None)
    if img_size is None:
        img_size = getattr(embed, "img_size", None) or model.default_cfg["input_size"][1:]
    # a convolution that runs on each channel alone takes one
    channels = getattr(embed, "in_chans", None) or getattr(getattr(embed, "proj", None), "in_channels", 3)
    return torch.zeros(1, channels, *to_2tuple(img_size), **kwargs)


@contextlib.contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _plain_inference(model: nn.Module) -> Iterator[None]:
    """Eval mode with every scan direction on, for a while."""
    training = model.training
    pruned = [method for method in getattr(model, "site_methods", ()) if isinstance(method, DynamicPruning)]
    policies = [method.direction_policy for method in pruned]
    for method in pruned:
        method.direction_policy = None
    try:
        yield model.eval()
    finally:
        model.train(training)
        for method, policy in zip(pruned, policies):
            method.direction_policy = policy


# --- fvcore ---


def _shape(value: Any) -> list[int] | None:
    """The shape of a value in a traced graph; None if it is no tensor."""
    return value.type().sizes() if value.isCompleteTensor() else None


def _scan_handler(inputs: list[Any], outputs: list[Any]) -> int:
    (batch, dim, seqlen), dstate = _shape(inputs[0]), _shape(inputs[2])[1]
    given = sum(_shape(inputs[place]) is not None for place in (5, 6))  # D and z
    return batch * dim * seqlen * (9 * dstate + given)


def _convolution_handler(inputs: list[Any], outputs: list[Any]) -> int:
    (batch, dim, seqlen), width = _shape(inputs[0]), _shape(inputs[1])[1]
    return batch * dim * seqlen * width


def _attention_handler(inputs: list[Any], outputs: list[Any]) -> int:
    *batch, queries, width = _shape(inputs[0])
    keys, out_width = _shape(inputs[2])[-2:]
    return torch.Size(batch).numel() * queries * keys * (width + out_width)


def _norm_handler(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


HANDLERS = {
    "mamba_ssm::selective_scan": _scan_handler,
    "causal_conv1d::forward": _convolution_handler,
    "aten::scaled_dot_product_attention": _attention_handler,
    **{f"aten::{kind}_norm": _norm_handler for kind in ("layer", "batch", "group", "instance")},
}


def traced_flops(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> dict[str, int]:
    """Multiply-adds of one image by kind of operator, as fvcore's tracer counts them, with handlers for this project's
    operators and for fused attention. All scan directions run; norms are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts functions, which torch is about to drop
        from fvcore.nn import FlopCountAnalysis
    with _plain_inference(model), torch.no_grad():
        device = next(model.parameters()).device
        analysis = FlopCountAnalysis(model, _image(model, img_size, device=device)).set_op_handle(**HANDLERS)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return {name: int(count) for name, count in analysis.by_operator().items() if count}

"""Published dense weights under this project's names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

# (pattern over the whole name, new name); the first that fits is taken
Rules = Sequence[tuple[str, str]]

_NORM = r"(?:bn|norm_layer|norm)"

# mmseg's UPerNet as published with Vim, FastVim and DyVM
SEGMENTER: Rules = (
    (r"backbone\.(fpn\d\..+)", r"neck.\1"),
    (r"backbone\.outnorm_(\d+)\.(.+)", r"backbone.outnorm.\1.\2"),
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"decode_head\.psp_modules\.(\d+)\.1\.(.+)", r"decode_head.decoder.psp.blocks.\1.1.\2"),
    (r"decode_head\.bottleneck\.(.+)", r"decode_head.decoder.psp.out_conv.\1"),
    (r"decode_head\.lateral_convs\.(\d+)\.(.+)", r"decode_head.decoder.fpn_lateral_blocks.<\1>.conv_norm_relu.\2"),
    (r"decode_head\.fpn_convs\.(\d+)\.(.+)", r"decode_head.decoder.fpn_conv_blocks.<\1>.\2"),
    (r"decode_head\.fpn_bottleneck\.(.+)", r"decode_head.decoder.fusion_block.\1"),
    (r"auxiliary_head\.convs\.0\.(.+)", r"auxiliary_head.convs.\1"),
)


def convert(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published `weights` of a dense model, renamed for `model`: nothing is computed.

    A model with a method `published_name` (a detector) says itself what a name becomes, None for what it does not hold;
    the rest is for a `Segmenter`. The backbone's last norm, which no map passes, is dropped. A convolution with its
    norm becomes places 0 and 1 of one module; the decoder counts its levels from the coarsest, published ones from the
    finest. Names that no rule knows stay as they are, so that loading strictly names them.
    """
    if hasattr(model, "published_name"):
        named = {model.published_name(name): value for name, value in weights.items()}
        return {name: value for name, value in named.items() if name is not None}
    weights = {name: value for name, value in weights.items() if ".norm_f." not in name}
    levels = len(model.decode_head.decoder.fpn_conv_blocks)
    return {_rename(name, SEGMENTER, levels): value for name, value in weights.items()}


def _rename(name: str, rules: Rules, levels: int) -> str:
    for pattern, new in rules:
        if match := re.fullmatch(pattern, name):
            name = match.expand(new)
            break
    else:
        return name
    name = re.sub(r"<(\d+)>", lambda match: str(levels - 1 - int(match[1])), name)
    if name.startswith("backbone."):
        return name
    name = re.sub(r"(?<=\.)conv\.(?=[^.]+$)", "0.", name)
    return re.sub(rf"(?<=\.){_NORM}\.(?=[^.]+$)", "1.", name)

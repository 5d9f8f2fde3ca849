"""Arguments of the packages' operators that may be broken, drawn by hypothesis, and the judge of what becomes of them.

See `benchmarks.bad_inputs`, which does the same for files and command lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from hypothesis import strategies as st
from mamba_ssm.ops import linear
from mamba_ssm.ops.bidirectional import bidirectional_scan_fn
from mamba_ssm.ops.directions import Direction, directions_fn
from mamba_ssm.ops.merging import match_tokens_fn, merge_tokens_fn
from mamba_ssm.ops.pooled import Lines, Projections, Taps, pooled_conv_fn, pooled_gate_fn, pooled_scan_fn
from mamba_ssm.ops.selective_scan_interface import (
    FastVim_mamba_inner_fn_no_out_proj_withoutZ,
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    pooled_selective_scan_fn,
    selective_scan_fn,
)
from mamba_ssm.ops.triton.layernorm import layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.visible import VisibleLines, visible_conv_fn, visible_gate_fn
from torch import Tensor

from benchmarks.bad_inputs import ACCEPTED, REFUSED, SECONDS, alarm

# letters are sizes: batch, dim, seqlen l, L = a multiple of it, n = dstate, width, v = w - 1, rank of dt, E = 2*dim,
# p = r + 2n, model, groups, a = g - 1; "?" marks what may be None; "/" parts layouts that are alike good
_SCAN = dict(u="bdl", delta="bdl", A="dn", B="bnl/bgnl/dn", C="bnl/bgnl/dn", D="?d", z="?bdl", delta_bias="?d")
_DIRECTION = {
    **dict(conv_weight="dw", conv_bias="?d", x_proj_weight="pd", dt_proj_weight="dr", dt_bias="?d"),
    **dict(A="dn", D="?d"),
}
_TAPS = dict(weight="dw", bias="?d", D="d")
_PROJECTIONS = dict(x_proj="pd", dt_proj="dr", dt_bias="d", A_log="dn")


def _twice(layouts: dict[str, str]) -> dict[str, str]:
    return layouts | {f"{name}_b": layout for name, layout in layouts.items()}


def _own_linear(x: Any, weight: Any, bias: Any) -> Tensor:
    """`linear` on the package's own product, as on processors where that is the faster one."""
    before = linear._PREFER_OWN, linear._MIN_MULTIPLICATIONS
    linear._PREFER_OWN, linear._MIN_MULTIPLICATIONS = True, 0
    try:
        return linear.linear(x, weight, bias)
    finally:
        linear._PREFER_OWN, linear._MIN_MULTIPLICATIONS = before


def _both_scans(**tensors: Any) -> tuple[Tensor, Tensor]:
    given = list(tensors.values())
    return bidirectional_scan_fn(given[:8], given[8:], True)


def _both_directions(xz: Any, **tensors: Any) -> Tensor:
    given = list(tensors.values())
    return directions_fn(xz, [Direction(*given[:7]), Direction(*given[7:], True)], 0.5)


def _lines(x: Any, count: Any, across: Any) -> Lines | None:
    """`count` lines of the tokens of `x`, as many of each as there are, one after another or side by side."""
    length = (
        x.shape[1] // count if isinstance(count, int) and count > 0 and isinstance(x, Tensor) and x.dim() > 1 else 1
    )
    return Lines.of_grid((length, count), (1, 0)) if across else Lines.of_grid((count, length))


def _pooled_conv(x: Any, count: Any, across: Any, **taps: Any) -> tuple[Tensor, ...]:
    given = list(taps.values())
    return pooled_conv_fn(x, Taps(*given[:3]), Taps(*given[3:]), _lines(x, count, across))


def _pooled_scan(groups: Any, groups_b: Any, **projections: Any) -> Tensor:
    given = list(projections.values())
    return pooled_scan_fn(groups, groups_b, Projections(*given[:4]), Projections(*given[4:]))


def _pooled_gate(skip: Any, groups: Any, z: Any, weight: Any, bias: Any, count: Any, across: Any) -> Tensor:
    return pooled_gate_fn(skip, groups, z, weight, bias, 1e-5, _lines(skip, count, across), 0.5)


def _whole(numbers: Any) -> Any:
    """Whole numbers of 0 and more out of what was drawn, where it is a tensor that has some."""
    return numbers.abs().long() if isinstance(numbers, Tensor) and not numbers.is_complex() else numbers


def _visible(order: Any, starts: Any, is_right: bool) -> VisibleLines:
    """Lines as drawn, or right ones of that shape."""
    order, starts = _whole(order), _whole(starts)
    if is_right and all(isinstance(each, Tensor) and each.dim() == 2 for each in (order, starts)):
        order = torch.arange(order.shape[1], device=order.device).flip(0).expand(order.shape).contiguous()
        starts = torch.zeros_like(starts)
        starts[:, -1:] = order.shape[1]
    return VisibleLines(order, starts, 0.5)


def _visible_conv(x: Any, order: Any, starts: Any, is_right: bool, **taps: Any) -> tuple[Tensor, ...]:
    given = list(taps.values())
    return visible_conv_fn(x, Taps(*given[:3]), Taps(*given[3:]), _visible(order, starts, is_right))


def _visible_gate(order: Any, starts: Any, is_right: bool, **given: Any) -> Tensor:
    return visible_gate_fn(**given, eps=1e-5, lines=_visible(order, starts, is_right), share=0.5)


def _conv_with_states(seq_idx: Any, **given: Any) -> Any:
    return causal_conv1d_fn(**given, seq_idx=_whole(seq_idx))


def _update_at(cache_seqlens: Any, conv_state_indices: Any, **given: Any) -> Tensor:
    return causal_conv1d_update(
        **given, cache_seqlens=_whole(cache_seqlens), conv_state_indices=_whole(conv_state_indices)
    )


def _match(metric: Any, fused: Any, places: list[int], moved: list[int]) -> tuple[Tensor, ...]:
    return match_tokens_fn(metric, fused, torch.tensor(places, dtype=torch.long).view(1, -1), moved)


def _merge(x: Any, slot: Any, count: Any) -> Tensor:
    slot, count = (each.abs().long() if isinstance(each, Tensor) else each for each in (slot, count))
    return merge_tokens_fn(x, slot, count)


OPERATORS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "causal_conv1d_fn": (causal_conv1d_fn, {"x": "bdl", "weight": "dw", "bias": "?d"}),
    "causal_conv1d_update": (causal_conv1d_update, {"x": "bd", "conv_state": "bdw", "weight": "dw", "bias": "?d"}),
    "causal_conv1d_fn with states": (
        _conv_with_states,
        {"x": "bdl", "weight": "dw", "bias": "?d", "seq_idx": "?bl", "initial_states": "?bdv"},
    ),
    "causal_conv1d_update of a ring": (
        _update_at,
        dict(x="bd/bdl", conv_state="bdw/bdv", weight="dw", bias="?d", cache_seqlens="?b", conv_state_indices="?b"),
    ),
    "selective_state_update": (
        selective_state_update,
        {
            **dict(state="bdn/bgdn", x="bd/bgd", dt="bd/bgd", A="dn/gdn", B="bn/bgn", C="bn/bgn", D="?d/gd"),
            **dict(z="?bd/bgd", dt_bias="?d/gd"),
        },
    ),
    "visible_conv_fn": (_visible_conv, {"x": "bld", "order": "bl", "starts": "bg"} | _twice(_TAPS)),
    "visible_gate_fn": (
        _visible_gate,
        dict(skip="bld", groups="bad", z="bld", weight="?d", bias="?d", order="bl", starts="bg"),
    ),
    "linear": (_own_linear, {"x": "bld/ld/d", "weight": "md", "bias": "?m"}),
    "bidirectional_scan_fn": (_both_scans, _twice(_SCAN)),
    "directions_fn": (_both_directions, {"xz": "blE"} | _twice(_DIRECTION)),
    "pooled_conv_fn": (_pooled_conv, {"x": "bLd"} | _twice(_TAPS)),
    "pooled_scan_fn": (_pooled_scan, {"groups": "bld", "groups_b": "bld"} | _twice(_PROJECTIONS)),
    "pooled_gate_fn": (_pooled_gate, dict(skip="bLd", groups="bld/b1d", z="bLd", weight="?d", bias="?d")),
    "match_tokens_fn": (_match, {"metric": "bLd"}),
    "merge_tokens_fn": (_merge, {"x": "bLd", "slot": "bL", "count": "bl"}),
    "layer_norm_fn": (layer_norm_fn, {"x": "bld", "weight": "d", "bias": "?d", "residual": "?bld"}),
    "rms_norm_fn": (rms_norm_fn, {"x": "bld", "weight": "d", "bias": "?d", "residual": "?bld"}),
    "selective_scan_fn": (
        selective_scan_fn,
        _SCAN,
    ),
    "pooled_selective_scan_fn": (
        pooled_selective_scan_fn,
        dict(u="bdL", u_compressed="bdl", delta="bdl", A="dn", B="bnl", C="bnl/dn", D="?d", z="?bdl", delta_bias="?d"),
    ),
    "mamba_inner_fn": (
        mamba_inner_fn,
        dict(
            **dict(xz="bEl", conv1d_weight="d1w", conv1d_bias="?d", x_proj_weight="pd", delta_proj_weight="dr"),
            **dict(out_proj_weight="md", out_proj_bias="?m", A="dn", B="?bnl", C="?bnl", D="?d", delta_bias="?d"),
            **dict(B_proj_bias="?n", C_proj_bias="?n"),
        ),
    ),
}
OPERATORS["mamba_inner_fn_no_out_proj"] = (
    mamba_inner_fn_no_out_proj,
    {name: layout for name, layout in OPERATORS["mamba_inner_fn"][1].items() if not name.startswith("out_proj")},
)
OPERATORS["FastVim_mamba_inner_fn_no_out_proj_withoutZ"] = (
    FastVim_mamba_inner_fn_no_out_proj_withoutZ,
    dict(
        **dict(x="bdL", conv1d_weight="d1w", conv1d_bias="?d", x_proj_weight="pd", delta_proj_weight="dr"),
        **dict(A="dn", B="?bnl", C="?bnl", D="?d", delta_bias="?d"),
    ),
)
OPERATORS["bimamba_inner_fn"] = (bimamba_inner_fn, OPERATORS["mamba_inner_fn"][1] | {"A_b": "dn"})
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "causal_conv1d_fn": {"activation": [None, "silu", "swish", "relu", 1], "reverse": [False, True]},
    "causal_conv1d_update": {"activation": [None, "silu", "relu"]},
    "causal_conv1d_fn with states": {
        "activation": [None, "silu", "relu"],
        "return_final_states": [False, True],
        "reverse": [False, False, True],
    },
    "causal_conv1d_update of a ring": {"activation": [None, "silu"]},
    "selective_state_update": {"dt_softplus": [False, True]},
    "visible_conv_fn": {"is_right": [False, True, True]},
    "visible_gate_fn": {"is_right": [False, True, True]},
    "FastVim_mamba_inner_fn_no_out_proj_withoutZ": {"line": [1, 2, 3, 0, -1, 10**9, 1.5], "scale": [1.0, 0.5]},
    "linear": {},
    "bidirectional_scan_fn": {},
    "directions_fn": {},
    "pooled_conv_fn": {"count": [1, 2, 3, 0, -1, 10**9, 1.5], "across": [False, True]},
    "pooled_scan_fn": {},
    "pooled_gate_fn": {"count": [1, 2, 3, 0, -1, 10**9, 1.5], "across": [False, True]},
    "match_tokens_fn": {
        "fused": [1, 2, 0, -1, 10**18, 0.5, None],
        "places": [[], [0], [1], [0, 2], [2, 0], [-1], [2**62]],
        "moved": [[], [0], [-1], [0, 1], [1, 0], [-1, -1], [0.5]],
    },
    "merge_tokens_fn": {},
    "layer_norm_fn": {"prenorm": [False, True], "is_rms_norm": [False, True]},
    "mamba_inner_fn_no_out_proj": {"delta_softplus": [False, True]},
    "bimamba_inner_fn": {"delta_softplus": [False, True]},
    "rms_norm_fn": {"prenorm": [False, True], "residual_in_fp32": [False, True]},
    "selective_scan_fn": {
        "delta_softplus": [False, True],
        "reverse": [False, True],
        "return_last_state": [False, True],
    },
    "pooled_selective_scan_fn": {"delta_softplus": [False, True], "reverse": [False, True]},
    "mamba_inner_fn": {"delta_softplus": [False, True]},
}


@dataclass
class Call:
    """A call of an operator; tensors are (shape, dtype, device, whether they want a gradient, how they lie)."""

    operator: str
    arguments: dict[str, Any]

    def build(self) -> dict[str, Any]:
        """The arguments themselves."""
        return {name: _tensor(*value) if isinstance(value, tuple) else value for name, value in self.arguments.items()}


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str, wants_grad: bool, way: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator).to(device, dtype)
    if way == "transposed" and len(shape) > 1:
        tensor = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif way == "expanded" and shape and 0 not in shape:
        tensor = tensor[..., :1].expand(shape)
    elif way == "nan" and dtype.is_floating_point:
        tensor = tensor.fill_(float("nan"))
    elif way == "large" and dtype.is_floating_point:
        tensor = tensor * 1e4
    return tensor.requires_grad_() if wants_grad and (dtype.is_floating_point or dtype.is_complex) else tensor


@st.composite
def calls(draw: st.DrawFn, operator: str | None = None) -> Call:
    """A call that fits, or one in which some arguments do not."""
    operator = operator or draw(st.sampled_from(list(OPERATORS)))
    size = st.integers(0, 5)
    sizes = {letter: draw(size) for letter in "bdlnrm"} | {
        "w": draw(st.integers(1, 5)),
        "1": 1,
        "g": draw(st.integers(1, 3)),
    }
    sizes |= {"a": max(sizes["g"] - 1, 0), "v": sizes["w"] - 1}
    sizes |= {"L": sizes["l"] * draw(st.integers(1, 3)), "E": 2 * sizes["d"], "p": sizes["r"] + 2 * sizes["n"]}
    signal_dtype = draw(st.sampled_from(DTYPES[:4]))
    grad = draw(st.booleans())
    arguments: dict[str, Any] = {}
    for name, layout in OPERATORS[operator][1].items():
        if layout.startswith("?") and draw(st.booleans()):
            arguments[name] = None
            continue
        shape = tuple(sizes[letter] for letter in draw(st.sampled_from(layout.lstrip("?").split("/"))))
        narrow = name.removesuffix("_b") in ("A", "D", "delta_bias", "dt_bias") and signal_dtype != torch.float64
        way = draw(st.sampled_from(["plain", "plain", "transposed", "expanded", "nan", "large"]))
        arguments[name] = (shape, torch.float32 if narrow else signal_dtype, "cpu", grad, way)
    names = st.sampled_from(list(arguments))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(names)
        arguments[name] = draw(_spoiled(arguments[name]))
    for name, values in OPTIONS[operator].items():
        arguments[name] = draw(st.sampled_from(values))
    return Call(operator, arguments)


@st.composite
def _spoiled(draw: st.DrawFn, value: Any) -> Any:
    """An argument with another shape, dtype or device, or none at all."""
    shape, dtype, device, grad, way = (
        value if isinstance(value, tuple) else ((2,), torch.float32, "cpu", False, "plain")
    )
    change = draw(st.sampled_from(["size", "fewer", "more", "dtype", "device", "object"]))
    if change == "size" and shape:
        place = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:place], draw(st.integers(0, 9)), *shape[place + 1 :])
    elif change == "fewer":
        shape = shape[1:]
    elif change == "more":
        shape = (*shape, draw(st.integers(0, 3)))
    elif change == "dtype":
        dtype = draw(st.sampled_from(DTYPES))
    elif change == "device":
        device = "meta"
    elif change == "object":
        return draw(st.sampled_from([None, 1, 0.5, "x", [1.0], np.ones(3)]))
    return shape, dtype, device, grad, way


def judge_call(call: Call) -> str:
    """Call the operator and, if it accepts, go back through it."""
    stage = "forward"
    try:
        with alarm(SECONDS):
            out = OPERATORS[call.operator][0](**call.build())
            stage = "backward"
            outs = out if isinstance(out, tuple) else (out,)
            wanted = [each.float().sum() for each in outs if each.requires_grad]
            if wanted:
                sum(wanted).backward()
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        if stage == "forward" and str(error).strip() and "\n" not in str(error).strip():
            return REFUSED
        return f"{stage} of {call}: {type(error).__name__}: {error}"
    except Exception as error:
        return f"{stage} of {call}: {type(error).__name__}: {error}"
    return ACCEPTED

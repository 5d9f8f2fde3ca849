"""The Mamba mixer: one class for one-directional Mamba and both bidirectional variants of Vision Mamba.

Gu and Dao 2023 (arXiv:2312.00752), section 3.4; Zhu et al. 2024 (arXiv:2401.09417), algorithm 1, for
`bimamba_type="v2"`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.ops.convolution import WIDTHS
from mamba_ssm.kernels.arguments import Direction, Ends, Projections, Taps
from mamba_ssm.modules.block import FirstBlock as Block  # noqa: F401  (published here, with these arguments)
from mamba_ssm.modules.linear import Linear
from mamba_ssm.modules.parts import is_plain
from mamba_ssm.ops.linear import linear
from mamba_ssm.ops.mixer import ScanObserver, TokenPooling, mix, mix_pooled, whole_mixer
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.whole import WholeMixer, WholePooledMixer, has_skipping, skipping_mixer_fn
from torch import Tensor, nn

DirectionGate = Callable[[Tensor], Tensor | tuple[bool, ...]]


def _wide(parameter: Tensor) -> Tensor:
    """A parameter of the scan in float32, or in float64 if it is."""
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


@dataclass
class _Branch:
    """One scan direction: a `Branch` of `mamba_ssm.ops.mixer`. v1 shares all but A, and convolves forward in both.

    Its modules are called, unless they are `plain`: then their weights go to operators that do the same, and faster.
    """

    conv: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    skip: Tensor
    dt_rank: int
    plain: bool
    reverse_conv: bool = False
    reverse: bool = False

    @property
    def A(self) -> Tensor:
        return -torch.exp(_wide(self.A_log))

    @property
    def D(self) -> Tensor:
        return _wide(self.skip)

    def convolve(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        if not self.plain:
            factor = None if token_mask is None else token_mask.unsqueeze(-1).to(x.dtype)
            x = x if factor is None else x * factor
            seen = (x.flip(1) if self.reverse_conv else x).transpose(1, 2)
            u = F.silu(self.conv(seen)[..., : x.shape[1]]).transpose(1, 2)
            u = u.flip(1) if self.reverse_conv else u
            return u if factor is None else u * factor
        weight, bias = self.conv.weight.squeeze(1), self.conv.bias
        options = {"activation": "silu", "reverse": self.reverse_conv, "mask": token_mask}
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, **options).transpose(1, 2)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dstate = self.A_log.shape[1]
        dt, B, C = self.x_proj(u).split([self.dt_rank, dstate, dstate], dim=-1)
        if not self.plain:
            return self.dt_proj(dt), B, C, None
        return linear(dt, self.dt_proj.weight), B, C, _wide(self.dt_proj.bias)

    def direction(self) -> Direction:
        """The parameters as `directions_fn` takes them, with log(-A); not for v1, which shares a convolution between
        both."""
        weights = self.conv.weight.squeeze(1), self.conv.bias, self.x_proj.weight, self.dt_proj.weight
        return Direction(*weights, _wide(self.dt_proj.bias), _wide(self.A_log), self.D, self.reverse)

    def taps(self) -> Taps:
        return Taps(self.conv.weight.squeeze(1), self.conv.bias, self.skip)

    def projections(self) -> Projections:
        return Projections(self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log)


def _by_directions(gates: Tensor) -> tuple[Tensor, list[int]]:
    """Images by the directions they run: gates (B, directions) -> their order (B,), those with the first direction
    alone, with both, with the second alone, with none; and how many each are. A single direction counts as both."""
    first, second = gates[:, 0].bool(), gates[:, -1].bool()
    kind = torch.where(first, second.long(), 3 - second.long())
    kinds = torch.arange(4, device=kind.device)
    # bincount reads how many kinds there are, too
    return kind.argsort(stable=True), (kind.unsqueeze(1) == kinds).sum(0).tolist()


@dataclass
class _Outside:
    """The projections of a mixer: an `Outside` of `mamba_ssm.ops.mixer`."""

    in_proj: nn.Linear
    out_proj: nn.Linear

    @property
    def plain(self) -> bool:
        return is_plain(self.in_proj, self.out_proj)

    def ends(self) -> Ends:
        return Ends(self.in_proj.weight, self.in_proj.bias, self.out_proj.weight, self.out_proj.bias)


class Mamba(nn.Module):
    """Selective state-space mixer, (B, L, d_model) -> (B, L, d_model).

    `bimamba_type` "none" (also if it is not given) scans forward only; "v1" adds a backward scan that shares every
    parameter but A; "v2" gives the backward direction its own convolution, projections, A and D; `bimamba` True is
    "v2", False "none". `if_divide_out` halves the sum of the two (also accepted under its published spelling
    `if_devide_out`). `dt_rank="auto"` is ceil(d_model / 16). `init_layer_scale` adds a learned scale on the output,
    `use_norm_after_ssm` a LayerNorm on the summed scans before the gate silu(z), as FastVim has. The operators that do
    the work bypass the mixer's modules, but only while those are as they were made: with an adapter, a hook, a
    parametrisation or pruning on any of them, or without `use_fast_path`, each is called.

    Raises:
        ValueError: a setting that there is not. TypeError: an argument that there is not, as other mixers have them.
    """

    # what others' mixers read in a forward of their own
    activation, act = "silu", staticmethod(F.silu)

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        bimamba_type: str | None = None,
        if_divide_out: bool | None = None,
        init_layer_scale: float | None = None,
        if_devide_out: bool | None = None,
        use_norm_after_ssm: bool | None = None,
        bimamba: bool | None = None,
        **others,
    ) -> None:
        super().__init__()
        if bimamba is not None:
            if bimamba_type not in (None, "v2" if bimamba else "none"):
                raise ValueError(f"bimamba is {bimamba} beside bimamba_type {bimamba_type!r}; wanted one of them.")
            bimamba_type = "v2" if bimamba else "none"
        if bimamba_type is None:
            bimamba_type = "none"
            # only Vision Mambas name these, and some of them have a mixer that scans both ways by itself
            if any(each is not None for each in (if_divide_out, if_devide_out, init_layer_scale, use_norm_after_ssm)):
                message = "this mixer scans one way, since bimamba_type is not given; Vision Mambas want 'v2'"
                warnings.warn(message, UserWarning, stacklevel=2)
        if bimamba_type not in ("none", "v1", "v2"):
            raise ValueError(f"bimamba_type is {bimamba_type!r}; wanted 'none', 'v1' or 'v2', which are all there are.")
        if others:
            # of other projects' mixers, some of which have more ways to scan
            raise TypeError(f"Mamba has no argument {', '.join(others)}; wanted those of Mamba or of Vim's mixer.")
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx, self.bimamba_type = use_fast_path, layer_idx, bimamba_type
        self.if_divide_out = bool(if_divide_out if if_devide_out is None else if_devide_out)

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self._add_direction("", conv_bias, factory)
        self._dt_start = dt_min, dt_max, dt_init, dt_scale, dt_init_floor
        self._init_dt(self.dt_proj, *self._dt_start)
        if bimamba_type == "v1":
            self.A_b_log = self._new_A_log(device)
        elif bimamba_type == "v2":
            self._add_direction("_b", conv_bias, factory)
        self.layernorm = nn.LayerNorm(self.d_inner, **factory) if use_norm_after_ssm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **factory)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, **factory))
        self.init_layer_scale = init_layer_scale

    def _new_A_log(self, device) -> nn.Parameter:
        """log(1 .. d_state) for every channel (S4D-real), float32, kept out of weight decay."""
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        parameter = nn.Parameter(states.log().repeat(self.d_inner, 1))
        parameter._no_weight_decay = True
        return parameter

    def _add_direction(self, suffix: str, conv_bias: bool, factory: dict) -> None:
        conv = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            self.d_conv,
            groups=self.d_inner,
            padding=self.d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        D = nn.Parameter(torch.ones(self.d_inner, device=factory["device"]))
        D._no_weight_decay = True
        setattr(self, f"conv1d{suffix}", conv)
        setattr(self, f"x_proj{suffix}", Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False, **factory))
        setattr(self, f"dt_proj{suffix}", nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory))
        setattr(self, f"A{suffix}_log", self._new_A_log(factory["device"]))
        setattr(self, f"D{suffix}", D)

    @staticmethod
    def _init_dt(proj: nn.Linear, dt_min: float, dt_max: float, init: str, scale: float, floor: float) -> None:
        """Weights of +-dt_rank^-0.5, and a bias whose softplus is log-uniform in [dt_min, dt_max] (Gu and Dao 2023,
        3.6)."""
        bound = proj.in_features**-0.5 * scale
        if init == "constant":
            nn.init.constant_(proj.weight, bound)
        elif init == "random":
            nn.init.uniform_(proj.weight, -bound, bound)
        else:
            raise ValueError(f"dt_init is {init!r}; wanted 'constant' or 'random'.")
        log_min, log_max = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand(proj.out_features, device=proj.bias.device) * (log_max - log_min) + log_min).clamp(
            min=floor
        )
        with torch.no_grad():
            # softplus(x) = dt  <=>  x = dt + log(1 - exp(-dt))
            proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        proj.bias._no_reinit = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start what is of the mixer itself again, that is A, D, the step size and the output's scale: for a mixer that
        was made on the device "meta". Its modules have a `reset_parameters` of their own."""
        for name in ("A_log", "A_b_log"):
            if hasattr(self, name):
                getattr(self, name).copy_(self._new_A_log(self.A_log.device))
        for name in ("D", "D_b"):
            if hasattr(self, name):
                getattr(self, name).fill_(1)
        if self.init_layer_scale is not None:
            self.gamma.fill_(self.init_layer_scale)
        self._init_dt(self.dt_proj, *self._dt_start)

    @property
    def directions(self) -> tuple[_Branch, ...]:
        """Forward first, then backward where there is one."""
        parts = self.conv1d, self.x_proj, self.dt_proj
        backward = (self.conv1d_b, self.x_proj_b, self.dt_proj_b) if self.bimamba_type == "v2" else ()
        plain = self.use_fast_path and self.d_conv in WIDTHS and is_plain(*parts, *backward, self.layernorm)
        forward = _Branch(*parts, self.A_log, self.D, self.dt_rank, plain)
        if self.bimamba_type == "v1":
            return forward, _Branch(*parts, self.A_b_log, self.D, self.dt_rank, plain, reverse=True)
        if self.bimamba_type == "v2":
            return forward, _Branch(*backward, self.A_b_log, self.D_b, self.dt_rank, plain, True, True)
        return (forward,)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params=None,
        *,
        pooling: TokenPooling | None = None,
        token_mask: Tensor | None = None,
        direction_gate: DirectionGate | None = None,
        observe: ScanObserver | None = None,
    ) -> Tensor:
        """Mix tokens: hidden_states (B, L, d_model) -> (B, L, d_model).

        `pooling` lets the scan run over groups of tokens (Kapse et al. 2025, FastVim). `token_mask` (B, L), 1 or 0,
        zeroes tokens before and after the convolution, so that they feed nothing into the state of others;
        `direction_gate` maps hidden_states to one factor per image and direction (B, directions) (Wu et al. 2025,
        DyVM), which outside training must be 0 or 1; or there to whether each direction runs, for all images, as a
        tuple, which is known without waiting for the device. `observe` is shown the step sizes and B that each
        direction's scan runs with, in turn. With `inference_params` (one-directional mixers only) the states for `step`
        are kept.
        """
        if isinstance(hidden_states, torch.fx.Proxy):
            raise TypeError("torch.fx cannot follow this mixer, which looks at sizes and values; wanted torch.export")
        if hidden_states.dim() != 3:
            raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}, wanted (batch, length, d_model)")
        if inference_params is not None:
            return self._decode(hidden_states, inference_params)
        if pooling is not None:
            if direction_gate is not None:
                raise ValueError("Pooled groups mix both directions: wanted pooling without direction_gate.")
            options = {"shared": self.bimamba_type == "v1", "norm": self.layernorm, "token_mask": token_mask}
            mixed = mix_pooled(hidden_states, self.directions, pooling, self._outside, self._share, **options)
            return self._scaled(mixed)
        gates = None if direction_gate is None else direction_gate(hidden_states)
        if isinstance(gates, tuple):
            branches = [branch for branch, runs in zip(self.directions, gates) if runs]
            if not branches:
                return torch.zeros_like(hidden_states)
            return self._mixed(hidden_states, branches, token_mask, None, observe)
        if gates is not None and not self.training:
            if observe is None and has_skipping(hidden_states):
                whole = self.whole(hidden_states, token_mask=token_mask)
                if whole is not None:
                    return skipping_mixer_fn(hidden_states, whole, gates.bool())
            order, counts = _by_directions(gates)
            if counts[1] < len(order):
                return self._skipping(hidden_states, token_mask, order, counts, observe)
            gates = None
        return self._mixed(hidden_states, self.directions, token_mask, gates, observe)

    def _mixed(
        self,
        hidden_states: Tensor,
        branches: Sequence[_Branch],
        token_mask: Tensor | None,
        gates: Tensor | None,
        observe: ScanObserver | None,
    ) -> Tensor:
        """All of the mixer, with some or all of the directions: (B, L, d_model) -> (B, L, d_model)."""
        options = {"token_mask": token_mask, "gates": gates, "observe": observe, "norm": self.layernorm}
        shared = self.bimamba_type == "v1"
        return self._scaled(mix(hidden_states, branches, self._outside, self._share, shared=shared, **options))

    def _skipping(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        order: Tensor,
        counts: list[int],
        observe: ScanObserver | None,
    ) -> Tensor:
        """The mixer where images skip directions (inference): those are left out of all work, not of the sum alone.

        `order` and `counts` are those of `_by_directions`. Images that run the same directions are made neighbours by a
        copy that is as narrow as tokens get.
        """
        out, both = None, self.directions
        for branches, images in zip((both[:1], both, both[1:]), order.split(counts)):
            if not len(images):
                continue
            mask = None if token_mask is None else token_mask[images]
            seen = None if observe is None else partial(observe, images=images)
            mixed = self._mixed(hidden_states[images], branches, mask, None, seen)
            out = mixed.new_zeros(*hidden_states.shape[:2], mixed.shape[2]) if out is None else out
            out.index_copy_(0, images, mixed)
        return torch.zeros_like(hidden_states) if out is None else out

    def _decode(self, hidden_states: Tensor, inference_params) -> Tensor:
        """Causal inference with cached states: the whole prompt first, then one token at a time through `step`."""
        if self.bimamba_type != "none":
            raise ValueError(f"Step-wise decoding is causal; wanted bimamba_type 'none', got {self.bimamba_type!r}.")
        conv_state, ssm_state = self._states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        length = x.shape[1]
        conv_state.copy_(F.pad(x.transpose(1, 2), (self.d_conv - length, 0)))
        (branch,) = self.directions
        u = branch.convolve(x)
        delta, B, C, bias = branch.project(u)
        y, last_state = selective_scan_fn(
            u.transpose(1, 2),
            delta.transpose(1, 2),
            branch.A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            branch.D,
            z.transpose(1, 2),
            bias,
            delta_softplus=True,
            return_last_state=True,
        )
        ssm_state.copy_(last_state)
        return self._scaled(self.out_proj(y.transpose(1, 2)))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One recurrent step: hidden_states (B, 1, d_model), conv_state (B, d_inner, d_conv) and ssm_state (B, d_inner,
        d_state), both updated in place. Returns (out (B, 1, d_model), conv_state, ssm_state).
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"hidden_states has {hidden_states.shape[1]} tokens; wanted 1, decoding goes token by token."
            )
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(x.contiguous(), conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt, (branch,) = F.softplus(_wide(self.dt_proj(dt))), self.directions
        # gradients of a step reach what it was given, not the steps before it: the states kept are numbers
        before = ssm_state.clone() if torch.is_grad_enabled() else ssm_state
        kept = before.detach() * torch.exp(dt.unsqueeze(-1) * branch.A) + (dt * x).unsqueeze(-1) * B.unsqueeze(1)
        ssm_state.copy_(kept.detach())
        y = torch.einsum("bdn,bn->bd", kept, _wide(C)) + branch.D * x
        return self._scaled(self.out_proj(y.to(x.dtype) * F.silu(z))).unsqueeze(1), conv_state, ssm_state

    def whole(
        self, x: Tensor, pooling: TokenPooling | None = None, token_mask: Tensor | None = None
    ) -> WholeMixer | WholePooledMixer | None:
        """The one operator that does all of `forward` with these; None where there is none that does."""
        if self.init_layer_scale is not None:
            return None
        options = {"shared": self.bimamba_type == "v1", "norm": self.layernorm}
        options |= {"pooling": pooling, "token_mask": token_mask}
        return whole_mixer(x, self.directions, self._outside, self._share, **options)

    @property
    def _share(self) -> float:
        """What the sum of the directions is multiplied by."""
        return 0.5 if self.if_divide_out and self.bimamba_type != "none" else 1.0

    @property
    def _outside(self) -> _Outside:
        return _Outside(self.in_proj, self.out_proj)

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.init_layer_scale is None else out * self.gamma

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> tuple[Tensor, Tensor]:
        """Zeroed (conv_state (B, d_inner, d_conv), ssm_state (B, d_inner, d_state)) for `step`; the length does not
        matter."""
        device = self.A_log.device
        conv_dtype = self.conv1d.weight.dtype if dtype is None else dtype
        return (
            torch.zeros(batch_size, self.d_inner, self.d_conv, device=device, dtype=conv_dtype),
            torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=torch.float32),
        )

    def _states_from_cache(self, inference_params, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("layer_idx is None; wanted this mixer's number, by which its decoding states are cached.")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        return cache[self.layer_idx]


class DynamicMamba(Mamba):
    """The mixer as DyVM's and FastVim's models make it: both ways, each with its own parameters, unless told otherwise.

    What those models do inside of it is here an argument of `forward`: `token_mask` and `direction_gate`, `pooling`.
    """

    def __init__(self, *args, bimamba_type: str = "v2", **keywords) -> None:
        super().__init__(*args, bimamba_type=bimamba_type, **keywords)

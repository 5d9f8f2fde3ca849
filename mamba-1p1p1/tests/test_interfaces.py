"""What other projects import from these packages and call, as they do: from names and signatures alone."""

import importlib
import inspect
import warnings

import pytest
import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm import Mamba
from mamba_ssm.modules.mamba_simple import DynamicMamba
from mamba_ssm.ops.selective_scan_interface import (
    FastVim_mamba_inner_fn_no_out_proj_withoutZ,
    SelectiveScanFn,
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

# module -> names, as published code imports them
IMPORTED = {
    "causal_conv1d": ["causal_conv1d_fn", "causal_conv1d_update"],
    "causal_conv1d.causal_conv1d_interface": ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update"],
    "causal_conv1d.causal_conv1d_varlen": ["causal_conv1d_varlen_states"],
    "causal_conv1d.cpp_functions": [
        *("causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function"),
    ],
    "causal_conv1d_cuda": ["causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"],
    "selective_scan_cuda": ["fwd", "bwd"],
    "mamba_ssm": ["Mamba", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"],
    "mamba_ssm.modules.mamba_simple": ["Block", "DynamicMamba", "Mamba"],
    "mamba_ssm.modules.mamba_simple_faster": ["Block", "DynamicMamba", "Mamba"],
    "faster_mamba_ssm": ["Mamba", "selective_scan_fn"],
    "mamba_ssm.modules.block": ["Block"],
    "mamba_ssm.models.config_mamba": ["MambaConfig"],
    "mamba_ssm.models.mixer_seq_simple": ["MambaLMHeadModel", "MixerModel", "create_block", "_init_weights"],
    "mamba_ssm.utils.generation": [
        *("GenerationMixin", "InferenceParams", "decode", "modify_logit_for_repetition_penalty", "sample"),
    ],
    "mamba_ssm.utils.hf": ["load_config_hf", "load_state_dict_hf"],
    "mamba_ssm.ops.selective_scan_interface": [
        *("selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref", "bimamba_inner_fn"),
        *("bimamba_inner_ref", "mamba_inner_fn_no_out_proj", "FastVim_mamba_inner_fn_no_out_proj_withoutZ"),
        *("BiMambaInnerFn", "MambaInnerFn", "MambaInnerFnNoOutProj", "SelectiveScanFn"),
    ],
    "mamba_ssm.ops.triton.layer_norm": [
        *("RMSNorm", "layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"),
    ],
    "mamba_ssm.ops.triton.layernorm": ["RMSNorm", "layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"],
    "mamba_ssm.ops.triton.selective_state_update": ["selective_state_update", "selective_state_update_ref"],
}


@pytest.mark.parametrize("module", IMPORTED)
def test_names(module):
    found = importlib.import_module(module)
    for name in IMPORTED[module]:
        assert callable(getattr(found, name)), name


ABSENT = ["modules.mamba2", "modules.mamba2_simple", "modules.mha", "modules.mlp", "modules.ssd_minimal"]
ABSENT += [f"ops.triton.{name}" for name in ("ssd_combined", "ssd_chunk_scan", "ssd_chunk_state", "layernorm_gated")]


@pytest.mark.parametrize("module", ["", *ABSENT])
def test_what_is_not_there_says_what_is(module):
    with pytest.raises(ImportError, match="this mamba_ssm .*has no .* it has (.*first paper|layer_norm's RMSNorm)"):
        importlib.import_module(f"mamba_ssm.{module}") if module else importlib.import_module("mamba_ssm").Mamba2


def test_keywords_of_newer_releases():
    newer = ["cache_seqlens", "conv_state_indices"]
    assert (
        list(inspect.signature(importlib.import_module("causal_conv1d").causal_conv1d_update).parameters)[5:] == newer
    )
    wanted = ["seq_idx", "initial_states", "return_final_states", "final_states_out", "activation"]
    assert list(inspect.signature(causal_conv1d_fn).parameters)[3:8] == wanted
    assert SelectiveScanFn.apply is selective_scan_fn
    for fn in (mamba_inner_fn, bimamba_inner_fn, mamba_inner_fn_no_out_proj):
        parameters = inspect.signature(fn).parameters
        assert {"checkpoint_lvl", "b_rms_weight", "c_rms_weight", "dt_rms_weight", "b_c_dt_rms_eps"} <= set(parameters)


# --- the mixer ---


def test_vim_style_calls():
    torch.manual_seed(0)
    assert Mamba(16, bimamba=True).bimamba_type == "v2"
    assert Mamba(16, bimamba=False).bimamba_type == "none"
    with pytest.raises(ValueError, match="wanted one of them"):
        Mamba(16, bimamba=True, bimamba_type="v1")
    with pytest.raises(ValueError, match="bimamba_type is 'v3'; wanted 'none', 'v1' or 'v2', which are all there are"):
        Mamba(16, bimamba_type="v3", nslices=5)
    with pytest.raises(TypeError, match="Mamba has no argument nframes, scan_type; wanted those of Mamba or of Vim's"):
        Mamba(16, nframes=8, scan_type="sweep")
    # one that names what only Vision Mambas have, whatever it says
    for keywords in ({"if_devide_out": False}, {"if_divide_out": True}, {"init_layer_scale": 0.1}):
        with pytest.warns(UserWarning, match="scans one way, since bimamba_type is not given"):
            Mamba(16, **keywords)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mamba(16, layer_idx=0)
        both = [DynamicMamba(16, if_devide_out=True), Mamba(16, bimamba_type="v2", if_devide_out=True)]
        assert DynamicMamba(16, bimamba_type="none").bimamba_type == "none"
    both[0].load_state_dict(both[1].state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(both[0](x), both[1](x))


def test_one_direction_of_a_fastvim_mixer():
    """By hand, group by group; its two directions and gate make the mixer."""
    torch.manual_seed(0)
    mixer = Mamba(6, d_state=4, bimamba_type="none")
    x, weights = torch.randn(2, 12, 12), (mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight)
    A, bias = -mixer.A_log.exp(), mixer.dt_proj.bias
    given = x, *weights, mixer.dt_proj.weight, A
    out = FastVim_mamba_inner_fn_no_out_proj_withoutZ(*given, None, None, mixer.D, bias, line=4, scale=0.5)
    u = causal_conv1d_ref(x, weights[0].squeeze(1), weights[1], "silu")
    groups = u.reshape(2, 12, 3, 4).mean(3) * 0.5
    dt, B, C = (groups.mT @ weights[2].T).split([mixer.dt_rank, 4, 4], 2)
    y = selective_scan_ref(groups, mixer.dt_proj.weight @ dt.mT, A, B.mT, C.mT, None, None, bias, True)
    torch.testing.assert_close(out, y.repeat_interleave(4, 2) + mixer.D[:, None] * u)
    with pytest.raises(ValueError, match="line is 5, wanted one that divides the 12 tokens"):
        FastVim_mamba_inner_fn_no_out_proj_withoutZ(*given, line=5)


def test_a_forward_of_ones_own():
    """A subclass that goes about it by the published attributes and functions, as many projects do."""

    class Own(Mamba):
        def forward(self, hidden_states):
            x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
            x = causal_conv1d_fn(x, self.conv1d.weight.flatten(1), self.conv1d.bias, activation=self.activation)
            dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], -1)
            dt = self.dt_proj.weight @ dt.transpose(1, 2)
            given = x, dt, -torch.exp(self.A_log.float()), B.transpose(1, 2), C.transpose(1, 2), self.D.float()
            y = SelectiveScanFn.apply(*given, None, self.dt_proj.bias.float(), True)
            return self.out_proj((y * self.act(z)).transpose(1, 2))

    torch.manual_seed(0)
    own, x = Own(8), torch.randn(2, 5, 8)
    torch.testing.assert_close(own(x), Mamba.forward(own, x), rtol=1e-4, atol=1e-5)


def test_blocks_of_both_releases():
    """The first had the norm where the later ones have the MLP."""
    from mamba_ssm.modules import block, mamba_simple

    mixer = torch.nn.Identity
    first = mamba_simple.Block(8, lambda dim: mixer(), torch.nn.RMSNorm, False, True)
    later = block.Block(8, lambda dim: mixer(), lambda dim: mixer(), torch.nn.RMSNorm, False, True)
    assert isinstance(first, block.Block)
    assert first.mlp is None
    assert not hasattr(first, "norm2")
    for made in (first, later):
        assert isinstance(made.norm, torch.nn.RMSNorm)
        assert made.residual_in_fp32
        assert not made.fused_add_norm


def test_a_mixer_names_the_tensor_it_was_given():
    with pytest.raises(ValueError, match=r"hidden_states has shape \(20, 16\), wanted \(batch, length, d_model\)"):
        Mamba(16)(torch.randn(20, 16))


def test_wide_convolutions_of_a_mixer():
    torch.manual_seed(0)
    for width in (1, 5):
        mixer = Mamba(8, d_conv=width, bimamba_type="v2")
        x = torch.randn(2, 7, 8, requires_grad=True)
        out = mixer(x)
        out.sum().backward()
        assert out.shape == x.shape
        assert x.grad.any()


def test_steps_are_the_whole_and_are_differentiated():
    torch.manual_seed(0)
    mixer, x = Mamba(8, layer_idx=0), torch.randn(2, 5, 8)
    conv, ssm = mixer.allocate_inference_cache(2, 5)
    steps = [mixer.step(x[:, t : t + 1], conv, ssm)[0] for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), mixer(x), rtol=1e-4, atol=1e-5)
    torch.cat(steps, 1).sum().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())
    assert not ssm.requires_grad
    # of one step from nothing the gradients are those of a sequence of one
    fresh = mixer.allocate_inference_cache(2, 1)
    got = torch.autograd.grad(mixer.step(x[:, :1], *fresh)[0].sum(), mixer.in_proj.weight)[0]
    want = torch.autograd.grad(mixer(x[:, :1]).sum(), mixer.in_proj.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


# --- norms ---


@pytest.mark.parametrize("fn", [layer_norm_fn, rms_norm_fn])
def test_keywords_of_newer_norms(fn):
    torch.manual_seed(0)
    x, residual, weight, rows = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(8), torch.rand(2, 5)
    # named as projects name them, with what changes nothing
    named = {
        "x1": None,
        "weight1": None,
        "bias1": None,
        "dropout_p": 0.0,
        "rowscale": None,
        "return_dropout_mask": False,
    }
    given = weight, None, residual
    assert torch.equal(fn(x, *given, **named, eps=1e-5), fn(x, *given, eps=1e-5))
    scaled = fn(x, *given, eps=1e-5, rowscale=rows, zero_centered_weight=True)
    torch.testing.assert_close(scaled, fn(x * rows[..., None], weight + 1, None, residual, eps=1e-5))
    dropped, total = fn(x, *given, prenorm=True, dropout_p=0.5)
    kept = total - residual
    torch.testing.assert_close(kept, torch.where(kept.abs() < 1e-6, 0, 2 * x), rtol=1e-5, atol=1e-5)
    assert 0 < (kept.abs() < 1e-6).sum() < x.numel()
    with pytest.raises(ValueError, match=r"rowscale has shape \(2,\), wanted"):
        fn(x, *given, rowscale=rows[:, 0])
    for wrong in ({"x1": x}, {"weight1": weight}, {"return_dropout_mask": True}):
        with pytest.raises(NotImplementedError, match="wanted one input and one norm"):
            fn(x, *given, **wrong)


def test_keywords_of_a_newer_norm_module():
    assert RMSNorm(8, eps=1e-5, dropout_p=0.0, zero_centered_weight=False).eps == 1e-5
    for wrong in ({"dropout_p": 0.1}, {"zero_centered_weight": True}):
        with pytest.raises(NotImplementedError, match="wanted 0 and False: rms_norm_fn has both"):
            RMSNorm(8, **wrong)


# --- inner functions ---


def inner_arguments(complex_A, rank=3, dim=6, dstate=4, seqlen=7):
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=generator) / 2  # noqa: E731
    A = -torch.rand(dim, dstate, generator=generator)
    A, columns = (torch.complex(A, rand(dim, dstate)), 2 * dstate) if complex_A else (A, dstate)
    tensors = rand(2, 2 * dim, seqlen), rand(dim, 1, 4), rand(dim), rand(rank + 2 * columns, dim), rand(dim, rank)
    return *tensors, rand(5, dim), rand(5), A


def by_hand(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, rms=None):
    """Real and imaginary parts put together by complex numbers, one step at a time."""
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_ref(x, conv_weight.squeeze(1), conv_bias, "silu")
    rank, count = dt_proj.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    dt, B, C = torch.einsum("rd,bdl->blr", x_proj, x).split([rank, count, count], -1)
    if rms is not None:
        dt, B, C = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * w for v, w in zip((dt, B, C), rms))
    if A.is_complex():
        B, C = (torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()) for v in (B, C))
    delta = torch.nn.functional.softplus(dt @ dt_proj.t())
    state, rows = torch.zeros(2, *A.shape, dtype=A.dtype), []
    for t in range(x.shape[2]):
        step = delta[:, t, :, None]
        state = torch.exp(step * A) * state + step * B[:, t, None] * x[:, :, t, None]
        y = (state * C[:, t, None]).sum(-1)
        rows.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(rows, 1) * torch.nn.functional.silu(z.transpose(1, 2))
    return y @ out_proj.t() + out_bias


@pytest.mark.parametrize("fn", [mamba_inner_fn, mamba_inner_ref])
def test_complex_A_with_B_and_C_of_the_input(fn):
    arguments = [tensor.requires_grad_() for tensor in inner_arguments(True)]
    outs = fn(*arguments), by_hand(*arguments)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), arguments) for out in outs]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fn", [mamba_inner_fn, mamba_inner_ref])
def test_normalised_dt_B_and_C(fn):
    """As FalconMamba calls it; without the weights its gradients would be of another model."""
    arguments = [tensor.requires_grad_() for tensor in inner_arguments(False)]
    rms = torch.rand(3) + 0.5, torch.rand(4) + 0.5, torch.rand(4) + 0.5
    keywords = dict(zip(("dt_rms_weight", "b_rms_weight", "c_rms_weight"), rms))
    # FalconMamba gives the weight of dt as long as the mixer is wide
    keywords["dt_rms_weight"] = torch.cat([rms[0], torch.full((3,), torch.nan)])
    out = fn(*arguments, checkpoint_lvl=0, b_c_dt_rms_eps=1e-5, **keywords)
    outs = out, by_hand(*arguments, rms)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(each.square().sum(), arguments) for each in outs]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"b_rms_weight has shape \(3,\), wanted \(4,\)"):
        fn(*arguments, **(keywords | {"b_rms_weight": torch.ones(3)}))


# --- compiled modules' names ---


@pytest.mark.parametrize("with_z", [False, True])
def test_selective_scan_cuda(with_z):
    import selective_scan_cuda

    torch.manual_seed(0)
    u, delta, z, dout = torch.randn(4, 2, 6, 7).unbind(0)
    A, B, C, D, bias = (
        -torch.rand(6, 4),
        torch.randn(2, 1, 4, 7),
        torch.randn(2, 1, 4, 7),
        torch.randn(6),
        torch.randn(6),
    )
    z = z if with_z else None
    out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (u, delta, A, B, C, D, z, bias)]
    wanted, last_state = selective_scan_ref(*leaves, True, True)
    torch.testing.assert_close(rest[0] if with_z else out, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x[:, :, -1, 1::2], last_state, rtol=1e-4, atol=1e-5)
    given = u, delta, A, B, C, D, z, bias, dout, x, out, torch.empty_like(u) if with_z else None, True, with_z
    du, ddelta, dA, dB, dC, dD, dbias, *rest = selective_scan_cuda.bwd(*given)
    wanted.backward(dout)
    found = (du, ddelta, dA, dB, dC, dD, rest[0] if with_z else None, dbias)
    for got, leaf in zip(found, leaves):
        assert (got is None) == (leaf is None)
        if leaf is not None:
            torch.testing.assert_close(got, leaf.grad, rtol=1e-3, atol=1e-4)
    if with_z:
        torch.testing.assert_close(rest[1], wanted.detach(), rtol=1e-4, atol=1e-5)


def test_causal_conv1d_cuda():
    import causal_conv1d_cuda

    x, weight, bias, dout = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 9)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    wanted = causal_conv1d_ref(*leaves, "silu")
    places = None, None, torch.empty_like(x), None
    for rest in ((True,), (None, True), (None, None, None, True), (*places, True)):
        torch.testing.assert_close(causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, *rest), wanted.detach())
    wanted.backward(dout)
    for rest in ((None, True), (None, torch.empty_like(x), True)):
        for got, leaf in zip(causal_conv1d_cuda.causal_conv1d_bwd(x, weight, bias, dout, *rest), leaves):
            torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)
    state = torch.zeros(2, 6, 4)
    steps = [causal_conv1d_cuda.causal_conv1d_update(x[..., t], state, weight, bias, True) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, -1), wanted.detach())
    # releases from 1.2 on: the gradients of states too, and from 1.5 on into places that are given
    states, last = torch.randn(2, 6, 3), torch.empty(2, 6, 3)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, states)]
    options = {"initial_states": leaves[3], "return_final_states": True, "activation": "silu"}
    outs = causal_conv1d_fn(*leaves[:3], **options)
    out = causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, None, states, last, True)
    torch.testing.assert_close((out, last), tuple(each.detach() for each in outs))
    dlast = torch.randn(2, 6, 3)
    torch.autograd.backward(outs, (dout, dlast))
    grads = [leaf.grad for leaf in leaves]
    torch.testing.assert_close(
        causal_conv1d_cuda.causal_conv1d_bwd(x, weight, bias, dout, None, states, dlast, None, True, True),
        tuple(grads),
    )
    *_, none = causal_conv1d_cuda.causal_conv1d_bwd(x, weight, bias, dout, None, states, dlast, None, False, True)
    assert none is None
    places = [torch.empty_like(grad) for grad in grads]
    causal_conv1d_cuda.causal_conv1d_bwd(x, weight, bias, dout, None, states, dlast, *places, True)
    torch.testing.assert_close(places, grads)


def test_states_of_sequences_one_behind_the_other():
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

    x = torch.arange(1.0, 15).reshape(7, 2)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 5, 5, 7], dtype=torch.int32), 3)
    wanted = [x[2:5], torch.zeros(3, 2), torch.cat([torch.zeros(1, 2), x[5:]])]
    assert torch.equal(states, torch.stack([rows.T for rows in wanted]))
    with pytest.raises(ValueError, match=r"x has shape \(1, 7, 2\), wanted \(tokens, dim\)"):
        causal_conv1d_varlen_states(x[None], torch.tensor([0, 7]), 3)


# --- decoding ---


@pytest.mark.parametrize("heads", [None, 4])
def test_state_update_is_a_step_of_the_scan(heads):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    torch.manual_seed(0)
    batch, dim, dstate, seqlen = 2, 3, 5, 6
    shape = (batch, dim) if heads is None else (batch, heads, dim)
    x, dt, z = torch.randn(3, seqlen, *shape).unbind(0)
    A, D, bias = -torch.rand(*shape[1:], dstate), torch.randn(shape[1:]), torch.randn(shape[1:])
    B, C = torch.randn(2, seqlen, batch, *([] if heads is None else [2]), dstate).unbind(0)
    state, outs = torch.zeros(*shape, dstate), []
    for t in range(seqlen):
        outs.append(selective_state_update(state, x[t], dt[t], A, B[t], C[t], D, z[t], bias, dt_softplus=True))
    flat = [v.flatten(2).permute(1, 2, 0) for v in (x, dt, z)]
    matrices = [v.permute(1, 2, 0) if heads is None else v.permute(1, 2, 3, 0) for v in (B, C)]
    wanted, last = selective_scan_fn(
        *flat[:2], A.reshape(-1, dstate), *matrices, D.flatten(), flat[2], bias.flatten(), True, True
    )
    torch.testing.assert_close(torch.stack(outs, -1).flatten(1, -2), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.reshape(batch, -1, dstate), last, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="dt has shape"):
        selective_state_update(state, x[0], dt[0, :1], A, B[0], C[0])
    # of more sequences than there are tokens of
    many, rows = torch.randn(5, *shape[1:], dstate), torch.tensor([3, 1], dtype=torch.int32)
    wanted, before = many.clone(), many[rows.long()]
    step = x[0], dt[0], A, B[0], C[0]
    y = selective_state_update(many, *step, state_batch_indices=rows)
    assert torch.equal(y, selective_state_update(before, *step))
    wanted[rows.long()] = before
    assert torch.equal(many, wanted)
    with pytest.raises(TypeError, match="state_batch_indices has dtype float32"):
        selective_state_update(many, *step, state_batch_indices=rows.float())


@pytest.fixture(scope="module")
def language_model():
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=29)).eval()


def test_language_model(language_model, tmp_path):
    ids = torch.randint(29, (2, 6))
    logits = language_model(ids).logits
    assert logits.shape == (2, 6, 32)
    assert language_model.lm_head.weight is language_model.backbone.embedding.weight
    torch.testing.assert_close(language_model(ids, num_last_tokens=1).logits, logits[:, -1:])
    language_model.save_pretrained(tmp_path)
    again = type(language_model).from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(again(ids).logits, logits)
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        type(language_model).from_pretrained(str(tmp_path.parent))


def test_a_body_without_what_later_releases_added():
    from mamba_ssm.models.mixer_seq_simple import MixerModel

    named, placed = MixerModel(d_model=8, n_layer=1, vocab_size=11), MixerModel(8, 1, 11, rms_norm=True)
    later = MixerModel(8, 1, 0, 11)
    assert all(model.embedding.weight.shape == (11, 8) for model in (named, placed, later))


def test_what_language_models_lack():
    from mamba_ssm.models.mixer_seq_simple import create_block

    for wrong in ({"ssm_cfg": {"layer": "Mamba2"}}, {"d_intermediate": 8}, {"attn_layer_idx": [1]}):
        with pytest.raises(NotImplementedError, match="wanted Mamba1 without MLP and attention"):
            create_block(16, **wrong)


def test_generation_is_the_greedy_choice_of_the_whole(language_model):
    """The states that are carried give what going through all tokens anew gives."""
    ids = torch.randint(29, (2, 4))
    found = language_model.generate(ids, max_length=9, cg=True, return_dict_in_generate=True, output_scores=True)
    sequences = ids
    for number in range(5):
        with torch.no_grad():
            logits = language_model(sequences).logits[:, -1]
        torch.testing.assert_close(found.scores[number], logits, rtol=1e-4, atol=1e-4)
        sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.sequences, sequences)
    stopped = language_model.generate(ids[:1], max_length=9, eos_token_id=int(sequences[0, 4]))
    assert stopped.shape == (1, 5)


def test_sampling():
    from mamba_ssm.utils.generation import sample

    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(400, -1)
    assert (sample(logits) == 1).all()
    assert set(sample(logits, top_k=2).tolist()) == {1, 2}
    assert set(sample(logits, top_k=0, top_p=0.6).tolist()) == {1}
    assert set(sample(logits, top_k=0, min_p=0.2).tolist()) == {1, 2}
    assert set(sample(logits, top_k=0, temperature=3.0).tolist()) == {0, 1, 2, 3}


def test_penalty_of_what_has_come_and_streamers(language_model):
    from mamba_ssm.utils.generation import modify_logit_for_repetition_penalty

    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    lower = modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1, 0]]), 4.0)
    assert torch.equal(lower, torch.tensor([[0.5, -8.0, 1.0, 0.5]]))

    class Streamer(list):
        put, ended = list.append, 0

        def end(self):
            self.ended += 1

    streamer, ids = Streamer(), torch.randint(29, (1, 4))
    found = language_model.generate(ids, max_length=9, repetition_penalty=1e6, streamer=streamer, vocab_size=29)
    assert torch.equal(torch.cat([part.reshape(1, -1) for part in streamer], 1), found)
    assert streamer.ended == 1
    # nothing comes twice, were its logit ever so good
    assert len(set(found[0, 4:].tolist()) - set(ids[0].tolist())) == 5

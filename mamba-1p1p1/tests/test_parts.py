"""The mixer's modules are modules: what is done to one of them is done to the mixer, and plain ones cost nothing."""

import copy

import pytest
import torch
from mamba_ssm import Mamba
from mamba_ssm.modules.parts import is_plain
from mamba_ssm.ops.pooled import Lines
from mamba_ssm.ops.triton.layernorm import RMSNorm
from torch import nn
from torch.nn.utils import parametrizations, prune


class Rows:
    """Pools pairs of tokens; the fused kernels know it as lines, and as no lines."""

    def __init__(self, lines):
        self.lines, self.backward = lines, None

    def order(self, x):
        return x

    restore = order

    def reduce(self, x):
        return x.unflatten(1, (-1, 2)).mean(2)

    def expand_add(self, x, groups):
        return x + groups.repeat_interleave(2, 1)


def masked(mixer, x):
    return mixer(x, token_mask=torch.tensor([[1.0] * 5 + [0.0]] * len(x)))


def gated(mixer, x):
    count = len(mixer.directions)
    return mixer.train()(x, direction_gate=lambda x: torch.linspace(0.2, 0.9, len(x) * count).view(-1, count))


def skipping(mixer, x):
    gates = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[:, : len(mixer.directions)]
    return mixer.eval()(x, direction_gate=lambda x: gates)


def observed(mixer, x):
    seen = []
    out = mixer(x, observe=lambda delta, B: seen.append(delta))
    return torch.cat([out, *(delta[..., : out.shape[-1]] for delta in seen)], -1)


WAYS = {
    "plain": lambda mixer, x: mixer(x),
    "mask": masked,
    "gates": gated,
    "skipping": skipping,
    "observed": observed,
    "pooled lines": lambda mixer, x: mixer(x, pooling=Rows(Lines.of_grid((3, 2)))),
    "pooled": lambda mixer, x: mixer(x, pooling=Rows(None)),
}


def mixer_of(kind="v2", norm=False):
    torch.manual_seed(0)
    return Mamba(8, d_state=4, bimamba_type=kind, if_divide_out=True, use_norm_after_ssm=norm)


def parts_of(mixer):
    return {
        name: part for name, part in mixer.named_children() if isinstance(part, (nn.Linear, nn.Conv1d, nn.LayerNorm))
    }


@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("way", WAYS)
def test_calling_every_part_is_what_the_fast_path_does(way, kind, norm):
    fast, x = mixer_of(kind, norm), torch.randn(3, 6, 8)
    slow = copy.deepcopy(fast)
    slow.use_fast_path = False
    called = set()
    for name, part in parts_of(slow).items():
        part.register_forward_hook(lambda *_, name=name: called.add(name))
    outs = [WAYS[way](mixer, x) for mixer in (fast, slow)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    assert called == set(parts_of(slow))
    grads = [torch.autograd.grad(out.square().sum(), list(m.parameters())) for out, m in zip(outs, (fast, slow))]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*parts_of(mixer_of("v2", True))])
def test_hooks_of_one_part_alone(name):
    """They run, see what passes, and change it; removed, the mixer is what it was."""
    mixer, x = mixer_of("v2", True), torch.randn(2, 6, 8)
    before, part = mixer(x).detach(), parts_of(mixer)[name]
    seen = []
    handles = [
        part.register_forward_pre_hook(lambda module, args: seen.append("before")),
        part.register_forward_hook(lambda module, args, out: 2 * out),
        part.register_full_backward_hook(lambda module, given, wanted: seen.append("backward")),
    ]
    changed = mixer(x)
    changed.sum().backward()
    assert seen == ["before", "backward"]
    assert not torch.allclose(changed, before)
    for handle in handles:
        handle.remove()
    assert torch.equal(mixer(x), before)


def test_hooks_of_all_modules():
    mixer, seen = mixer_of(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        mixer(torch.randn(2, 6, 8))
    finally:
        handle.remove()
    assert {id(part) for part in parts_of(mixer).values()} <= {id(module) for module in seen}
    assert is_plain(*parts_of(mixer).values())


class Adapter(nn.Module):
    """A low-rank adapter that has the attributes of what it wraps, as the libraries' have."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.up = nn.Linear(base.in_features, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(x)


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"])
def test_adapters_are_used_and_trained(name):
    mixer, x = mixer_of(), torch.randn(2, 6, 8)
    before = mixer(x)
    setattr(mixer, name, Adapter(getattr(mixer, name)))
    out = mixer(x)
    out.sum().backward()
    assert getattr(mixer, name).up.weight.grad.any()
    base, up = getattr(mixer, name).base, getattr(mixer, name).up
    base.weight.data += up.weight.data
    setattr(mixer, name, base)
    torch.testing.assert_close(mixer(x), out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, before)


@pytest.mark.parametrize("name", ["conv1d", "x_proj", "dt_proj", "out_proj"])
def test_pruned_and_parametrised_parts_train(name):
    for change in (
        lambda part: prune.l1_unstructured(part, "weight", amount=0.5),
        lambda part: parametrizations.weight_norm(part),
    ):
        mixer, x = mixer_of(), torch.randn(2, 6, 8)
        change(getattr(mixer, name))
        optimizer = torch.optim.SGD(mixer.parameters(), lr=0.1)
        outs = []
        for _ in range(2):
            out = mixer(x)
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
            outs.append(out.detach())
        own = list(getattr(mixer, name).parameters())
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in own)
        assert not torch.allclose(*outs)


def test_dynamic_quantisation():
    mixer, x = mixer_of().eval(), torch.randn(2, 6, 8)
    with torch.no_grad():
        quantised = torch.ao.quantization.quantize_dynamic(mixer, {nn.Linear})
        error = (quantised(x) - mixer(x)).abs().max() / mixer(x).abs().max()
    assert type(quantised.dt_proj) is not nn.Linear
    assert 0 < error < 0.1


def test_compiled_mixers_call_what_is_hooked():
    mixer, x, seen = mixer_of().eval(), torch.randn(2, 6, 8), []
    with torch.no_grad():
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="eager")(x), mixer(x))
        mixer.x_proj.register_forward_hook(lambda *_: seen.append(1))
        torch.compiler.reset()
        torch.compile(mixer, fullgraph=True, backend="eager")(x)
    assert seen


def test_what_is_plain():
    assert is_plain(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), RMSNorm(2), nn.LayerNorm(2), None)
    changed = nn.Linear(2, 2)
    changed.forward = lambda x: x
    assert not is_plain(nn.LayerNorm(2), changed)
    assert not is_plain(nn.Sequential(nn.Linear(2, 2)))
    assert not is_plain(type("Mine", (nn.Linear,), {})(2, 2))


def test_peft_s_lora():
    peft = pytest.importorskip("peft")
    mixer, x = mixer_of(), torch.randn(2, 6, 8)
    before = mixer(x).detach()
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    model = peft.get_peft_model(mixer, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    out = model(x)
    assert not torch.allclose(out, before)
    out.sum().backward()
    trained = [name for name, parameter in model.named_parameters() if "lora_B" in name and parameter.grad.any()]
    assert len(trained) == len(names)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), out, rtol=1e-4, atol=1e-5)
    assert merged.directions[0].plain

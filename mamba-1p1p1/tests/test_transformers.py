"""transformers' models on these packages are what its own slow path computes: forward, gradients, generation.

`bash scripts/test_transformers.sh` makes an environment with transformers and runs this.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is no dependency: scripts/test_transformers.sh has it"
)

VOCABULARY = 31
COMMON = dict(vocab_size=VOCABULARY, hidden_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SCANNING = COMMON | dict(num_hidden_layers=2, state_size=4, intermediate_size=32, time_step_rank=3)
SMALL = {
    "mamba": dict(SCANNING),
    "falcon_mamba": dict(SCANNING),
    "lfm2": dict(
        **COMMON,
        **dict(num_hidden_layers=3, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1),
        layer_types=["conv", "full_attention", "conv"],
    ),
    "jamba": dict(
        **COMMON,
        **dict(num_hidden_layers=2, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, num_experts=2),
        **dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=3, num_experts_per_tok=1),
    ),
    "bamba": dict(
        **COMMON,
        **dict(num_hidden_layers=2, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1),
        **dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, attn_layer_indices=[1]),
    ),
    "qwen3_next": dict(
        **COMMON,
        **dict(num_hidden_layers=2, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8),
        **dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
        **dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8),
        layer_types=["linear_attention", "full_attention"],
    ),
}


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **SMALL[name]))
    with torch.no_grad():  # biases and norms start at nothing and at one, where mistakes would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def module_of(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@contextlib.contextmanager
def slow(model: str) -> Iterator[None]:
    """transformers' own functions instead of those of these packages."""
    module = module_of(model)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in vars(module).copy().items():
            original = getattr(function, "__wrapped__", None)
            if getattr(original, "__module__", "") == module.__name__ and not isinstance(function, type):
                patch.setattr(module, name, original)
        yield


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True])
def test_forward_and_gradients(name: str, training: bool) -> None:
    model, ids = made(name).train(training), tokens(2, 11)
    outs, grads = [], []
    for path in (contextlib.nullcontext(), slow(name)):
        with path:
            out = model(ids, labels=ids, use_cache=False)
        outs.append(out.logits)
        grads.append(torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for (parameter, _), got, want in zip(model.named_parameters(), *grads):
        assert (got is None) == (want is None), parameter
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("left", [0, 3])
def test_generation(name: str, left: int) -> None:
    """With `left` tokens of padding in front of the first sequence."""
    model, ids = made(name).eval(), tokens(2, 6)
    mask = torch.ones_like(ids)
    ids[0, :left], mask[0, :left] = 0, 0
    options = dict(attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    found = []
    for path in (contextlib.nullcontext(), slow(name)):
        with path, torch.no_grad():
            found.append(model.generate(ids, **options, return_dict_in_generate=True, output_logits=True))
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0].sequences, found[1].sequences)


def test_packed_samples_do_not_leak() -> None:
    """LFM2's convolutions see `seq_idx`: what stands in front of a sample in a pack changes nothing."""
    module = module_of("lfm2")
    torch.manual_seed(0)
    mixer = module.Lfm2ShortConv(transformers.AutoConfig.for_model("lfm2", **SMALL["lfm2"]), 0)
    x = torch.randn(1, 12, 16)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    packed = mixer(x, seq_idx=seq_idx)
    alone = torch.cat([mixer(x[:, :5]), mixer(x[:, 5:])], 1)
    torch.testing.assert_close(packed, alone)


def test_these_packages_are_what_runs(name: str) -> None:
    seen: set[str] = set()

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.namespace)
            return function(*args, **(kwargs or {}))

    with Seeing(), torch.no_grad():
        made(name).eval()(tokens(1, 5))
    assert "causal_conv1d" in seen
    assert ("mamba_ssm" in seen) == (name in ("mamba", "falcon_mamba", "jamba"))  # the others have no scan of Mamba 1

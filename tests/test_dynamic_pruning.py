"""Learned pruning: published numbers, training equal to inference, policies, gates, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion import Methods
from fusion.dynamic_pruning import (
    PruningLoss,
    PruningOutput,
    PruningSettings,
    ScorePredictor,
    evenly_spread,
    gumbel_sigmoid,
    kept_first,
    scale_gate_noise,
)
from fusion.token_state import TokenState, join_cls, mean_over_kept, split_cls
from models_mamba import VisionMamba
from tests.golden_rules import fill_model, images, load, relative_error

SHARES = (0.7, 0.49, 0.343)
PLAIN = dict(img_size=32, patch_size=4, embed_dim=32, depth=8, num_classes=10)
SMALL = PLAIN | dict(pruning_loc=(2, 4, 6), token_ratio=SHARES)
CLASS_TOKENS = {
    "middle": {},
    "head": dict(use_middle_cls_token=False),
    "double": dict(use_middle_cls_token=False, use_double_cls_token=True),
    "none": dict(use_middle_cls_token=False, if_cls_token=False),
}


def small(salt: int = 3, **keywords: Any) -> VisionMamba:
    model = timm.create_model("dyvm_tiny_patch16_224", drop_path_rate=0.0, **(SMALL | keywords))
    return fill_model(model, salt).eval()


def no_noise() -> Any:
    return mock.patch.object(Tensor, "exponential_", lambda self, *_: self.fill_(1.0))


# --- published numbers ---


@pytest.mark.parametrize(
    "case", ["dyvm_vim", "dyvm_vim_balanced", "dyvm_videomamba", "dyvm_mambareg", "dyvm_mambareg_balanced"]
)
def test_golden_model(case: str) -> None:
    config, arrays = load(case)
    model = timm.create_model(config["model"], drop_path_rate=0.0, **config["kwargs"])
    model = fill_model(model, config["salt"]).eval()
    x = images(config["input"], config["salt"])
    with torch.no_grad():
        output = model.forward_with_decisions(x)
        assert torch.equal(model(x), output.logits)
    assert relative_error(output.logits, arrays["logits"]) < 2e-4
    assert torch.equal(output.block_policy, arrays["block_policy"])
    counts = [int(ratio * 64) for ratio in config["kwargs"]["token_ratio"]]
    assert [decision.sum(1).tolist() for decision in output.decisions] == [[float(n)] * len(x) for n in counts]

    with no_noise():
        output = model.train()(x)
    assert isinstance(output, PruningOutput)
    (output.logits * images(output.logits.shape, 77)).sum().backward()
    got = output._asdict() | {"decisions": torch.stack(output.decisions)}
    for name, value in got.items():
        wanted = arrays[f"train_{name}"]
        assert value.shape == wanted.shape
        assert relative_error(value.detach(), wanted) < 2e-4, name
    parameters = dict(model.named_parameters())
    for key in (key for key in arrays if key.startswith("grad:")):
        assert relative_error(parameters[key.removeprefix("grad:")].grad, arrays[key]) < 1e-3, key


def test_golden_rearrangement() -> None:
    config, arrays = load("dyvm_rearrange")
    order, kept = kept_first(arrays["policy_in"].squeeze(-1))
    assert torch.equal(order, arrays["positions"])
    assert torch.equal(kept // 2, arrays["cls_position"])
    for name, seed in (("tokens", config["seed"]), ("residual", config["seed"] + 1)):
        x = images(config["shape"], seed)
        assert torch.equal(x.gather(1, order.unsqueeze(-1).expand_as(x)), arrays[name])


class _Teacher(nn.Module):
    num_prefix_tokens = 1

    def __init__(self, logits: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.logits, self.tokens = logits, tokens

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(self.tokens[:, :1], 1e3), self.tokens], 1)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.logits


class _CrossEntropy(nn.Module):
    def forward(self, samples: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)


def _golden_loss() -> tuple[PruningLoss, PruningOutput, dict[str, Tensor]]:
    settings, arrays = load("dyvm_loss")
    config = PruningSettings(
        token_ratio=tuple(settings["token_keep_ratio"]), block_keep_ratio=settings["block_keep_ratio"]
    )
    output = PruningOutput(*(arrays[name] for name in PruningOutput._fields))
    output = output._replace(decisions=list(output.decisions))
    teacher = _Teacher(arrays["teacher_logits"], arrays["teacher_tokens"])
    weights = settings["token_pruning_weight"], settings["block_pruning_weight"], settings["distill_weight"]
    return PruningLoss(_CrossEntropy(), teacher, config, *weights), output, arrays


def test_golden_loss() -> None:
    criterion, output, arrays = _golden_loss()
    loss = criterion(torch.empty(0), output, arrays["labels"])
    assert relative_error(loss, arrays["total"]) < 1e-5
    assert list(criterion.parts) == ["classification", "token_ratio", "block_ratio", "logit_kl", "token_mse"]
    assert relative_error(torch.stack(list(criterion.parts.values())), arrays["loss_parts"]) < 1e-5


def test_loss_without_kept_tokens_and_teacher_that_stays_in_eval_mode() -> None:
    criterion, output, arrays = _golden_loss()
    output = output._replace(token_policy=torch.zeros_like(output.token_policy))
    assert criterion.train()(torch.empty(0), output, arrays["labels"]).isfinite()
    assert criterion.parts["token_mse"] == 0
    assert not criterion.teacher.training


# --- training equals inference ---


def forced(decisions: list[Tensor]) -> tuple[Any, Any]:
    """The same choices as a token policy for training and one for inference, of decisions over the original patches."""

    def mask(stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        # kept tokens of the stage before stand in front, in raster order, and the dropped ones behind
        order = torch.arange(policy.shape[1]).expand_as(policy)
        for before in decisions[:stage]:
            order = order.gather(1, kept_first(before.gather(1, order))[0])
        return decisions[stage].gather(1, order) * policy

    def index(stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        left = decisions[stage]
        if stage:
            previous = decisions[stage - 1].bool()
            left = left[previous].view(len(left), -1)
        return torch.stack([row.nonzero().squeeze(1) for row in left])

    return mask, index


def random_sets(keep: list[float], batch: int, patches: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, patches, generator=generator).argsort(1).argsort(1)
    return [(order < int(share * patches)).float() for share in keep]


@pytest.mark.parametrize("cls", CLASS_TOKENS)
@pytest.mark.parametrize("keep", [[0.7, 0.49, 0.343], [1, 1, 1], [0.5, 0, 0], [0, 0, 0], [1, 0.02, 0.02]], ids=str)
def test_training_equals_inference(cls: str, keep: list[float]) -> None:
    model = small(**CLASS_TOKENS[cls])
    method = model.site_methods[0]
    x, sets = images((3, 3, 32, 32), 5), random_sets(keep, 3, 64, seed=1)
    gates = torch.rand(8, 3, 2, generator=torch.Generator().manual_seed(2)).round()
    method.direction_policy = lambda layer, column: gates[layer]
    mask, index = forced(sets)
    method.token_policy = mask
    with torch.no_grad():
        trained = model.train()(x)
        method.token_policy = index
        inferred = model.eval().forward_with_decisions(x)
    assert trained.tokens.shape[1] == 64
    assert inferred.tokens.shape[1] == int(keep[-1] * 64)
    assert relative_error(trained.logits, inferred.logits) < 1e-4
    count = inferred.tokens.shape[1]
    assert torch.equal(trained.positions[:, :count], inferred.positions)
    if count:
        assert relative_error(trained.tokens[:, :count], inferred.tokens) < 1e-4


@pytest.mark.parametrize("cls", CLASS_TOKENS)
@pytest.mark.parametrize("predictor_input", ["hidden", "delta", "B"])
def test_training_with_its_own_choices_equals_inference_image_by_image(cls: str, predictor_input: str) -> None:
    """Images of a batch keep different numbers of tokens; each alone, pruned for real, gives the same logits."""
    model = small(salt=2, predictor_input=predictor_input, **CLASS_TOKENS[cls])
    method = model.site_methods[0]
    x = images((4, 3, 32, 32), 249)
    with torch.no_grad(), no_noise():
        trained = model.train()(x)
    method.token_policy = lambda stage, tokens, policy: (
        model.score_predictors[stage](tokens, policy).argmax(-1)[0].eq(0).nonzero().view(1, -1)
    )
    alone = []
    with torch.no_grad():
        for b in range(len(x)):
            # noise-free training gates are those of inference
            method.direction_policy = lambda layer, column, b=b: trained.block_policy[layer, b]
            alone.append(model.eval().forward_with_decisions(x[b : b + 1]))
    counts = {tuple(int(decision.sum()) for decision in output.decisions) for output in alone}
    assert len(counts) > 1
    assert relative_error(trained.logits, torch.cat([output.logits for output in alone])) < 1e-4
    for b, output in enumerate(alone):
        assert int(trained.token_policy[b].sum()) == output.tokens.shape[1]


def test_training_equals_inference_in_paired_models() -> None:
    keywords = SMALL | dict(pruning="both", drop_path_rate=0.0)
    model = fill_model(timm.create_model("fambav_tiny_patch16_224", **keywords), 4).eval()
    method = model.site_methods[0]
    x, (mask, index) = images((2, 3, 32, 32), 4), forced(random_sets(list(SHARES), 2, 64, seed=3))
    gates = torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(2)).round()
    method.direction_policy = lambda layer, column: gates[layer]
    with torch.no_grad():
        method.token_policy = mask
        trained = model.train()(x)
        method.token_policy = index
        assert relative_error(trained.logits, model.eval()(x)) < 1e-4
    assert trained.block_policy.shape == (8, 2, 1, 2)


def test_dropped_tokens_touch_nothing() -> None:
    model = small()
    method = model.site_methods[0]
    method.direction_policy = None
    method.token_policy, _ = forced(random_sets(list(SHARES), 2, 64, seed=1))
    model.train()
    x = images((2, 3, 32, 32), 1)
    prune = method._drop_tokens

    def spoil(stage: int, state: TokenState) -> TokenState:
        state = prune(stage, state)
        dropped = state.token_mask.unsqueeze(-1) == 0
        return state.replace(hidden=state.hidden + 50 * dropped, residual=state.residual - 20 * dropped)

    with torch.no_grad():
        clean = model(x).logits
        with mock.patch.object(method, "_drop_tokens", spoil):
            assert torch.equal(model(x).logits, clean)


# --- gates ---


def test_skipped_directions_are_left_out_and_change_nothing() -> None:
    model = small()
    method = model.site_methods[0]
    method.token_policy = None
    gates = torch.rand(8, 5, 2, generator=torch.Generator().manual_seed(0)).round()
    gates[3], gates[4], gates[5, :, 0] = 0, 1, 0
    method.direction_policy = lambda layer, column: gates[layer]
    x = images((5, 3, 32, 32), 8)
    with torch.no_grad():
        skipped = model(x)
        multiplied = model.train()(x).logits
    assert relative_error(skipped, multiplied) < 1e-5
    seen = []
    mixer = model.layers[3].mixer
    handles = [module.register_forward_hook(lambda *_: seen.append(1)) for module in (mixer.x_proj, mixer.x_proj_b)]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    assert not seen


def test_block_head_sees_the_class_token_column() -> None:
    model = small(pruning="block")
    columns = {}
    method = model.site_methods[0]
    method.direction_policy = lambda layer, column: columns.setdefault(layer, column)[:, :2] * 0 + 1
    seen = []
    model.layers[0].mixer.in_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(images((2, 3, 32, 32), 1))
    assert relative_error(columns[0], seen[-1][:, 32]) < 1e-6


def test_block_head_starts_with_all_directions_on() -> None:
    model = timm.create_model("dyvm_nano_patch4_32")
    for layer in model.layers:
        assert not layer.mixer.block_head.weight.any()
        assert torch.equal(layer.mixer.block_head.bias, torch.full((2,), 5.0))
    plain = timm.create_model("vim_nano_patch4_32").eval()
    gated = timm.create_model("vim_nano_patch4_32", pruning="block").eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    x = images((2, 3, 32, 32), 1)
    with torch.no_grad():
        assert relative_error(gated(x), plain(x)) < 1e-5


def test_gumbel_sigmoid_is_hard_unbiased_and_straight_through() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([-1.0, 0.0, 2.0]).repeat(20000, 1).requires_grad_()
    sample = gumbel_sigmoid(logits)
    assert set(sample.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert (sample.mean(0) - torch.tensor([-1.0, 0.0, 2.0]).sigmoid()).abs().max() < 0.015
    with no_noise():
        gumbel_sigmoid(logits).sum().backward()
    soft = (logits.detach() / 2).sigmoid()
    assert relative_error(logits.grad, soft * (1 - soft) / 2) < 1e-5


def test_gumbel_sigmoid_with_less_noise_and_with_none() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([-1.0, 0.3, 2.0]).repeat(20000, 1)
    assert (gumbel_sigmoid(logits, noise=0.5).mean(0) - (logits[0] / 0.5).sigmoid()).abs().max() < 0.015
    assert torch.equal(gumbel_sigmoid(logits, noise=0.0).round(decimals=5), (logits > 0).float())


def test_without_noise_training_runs_the_directions_of_inference() -> None:
    model = small(salt=2, pruning="block")
    x = images((4, 3, 32, 32), 249)
    with torch.no_grad():
        inference = model.forward_with_decisions(x).block_policy
        noisy = model.train()(x).block_policy
        assert scale_gate_noise(model, epoch=9, epochs=10, end=0.0) == 0
        quiet = model(x).block_policy
    assert 0 < inference.mean() < 1
    assert not torch.equal(noisy.round(decimals=5), inference)
    assert torch.equal(quiet.round(decimals=5), inference)


def test_gate_noise_falls_in_equal_steps() -> None:
    model = small(pruning="block")
    assert [scale_gate_noise(model, epoch, 5, 0.2) for epoch in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert model.site_methods[0].gate_noise == pytest.approx(0.2)
    assert scale_gate_noise(model, 0, 1, 0.2) == 1


# --- policies and parts ---


@pytest.mark.parametrize("kind", ["token", "block", "both"])
def test_each_mechanism_alone(kind: str) -> None:
    model = small(pruning=kind)
    names = [name for name, _ in model.named_parameters()]
    assert any("score_predictors" in name for name in names) == (kind != "block")
    assert any("block_head" in name for name in names) == (kind != "token")
    x = images((2, 3, 32, 32), 2)
    inferred, trained = model.forward_with_decisions(x), model.train()(x)
    assert (trained.block_policy is None) == (kind == "token") == (inferred.block_policy is None)
    assert len(trained.decisions) == len(inferred.decisions) == (0 if kind == "block" else 3)
    assert trained.tokens.shape == (2, 64, 32)
    assert inferred.tokens.shape == (2, 64 if kind == "block" else int(0.343 * 64), 32)
    teacher = fill_model(timm.create_model("vim_tiny_patch16_224", **PLAIN), 3)
    criterion = PruningLoss(_CrossEntropy(), teacher, model.methods.pruning)
    loss = criterion(x, trained, torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert ("token_ratio" in criterion.parts, "block_ratio" in criterion.parts) == (kind != "block", kind != "token")
    # the release compares no tokens where it prunes none
    criterion.compare_tokens = False
    parts = criterion.parts
    criterion(x, trained, torch.tensor([1, 2]))
    assert criterion.parts.keys() == parts.keys() - {"token_mse"}
    assert float(parts["token_mse"]) > 0


def test_evenly_spread() -> None:
    assert evenly_spread(196, 137).tolist() == torch.linspace(0, 195, 137, dtype=torch.float64).long().tolist()
    assert evenly_spread(10, 1).tolist() == [0]
    assert evenly_spread(10, 0).tolist() == []
    assert evenly_spread(7, 7).tolist() == list(range(7))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_static_policy(mode: bool) -> None:
    model = small(pruning_policy="static", block_keep_ratio=0.75).train(mode)
    assert not any("score" in name or "block_head" in name for name in model.state_dict())
    output = model.forward_with_decisions(images((2, 3, 32, 32), 2))
    first = evenly_spread(64, int(0.7 * 64))
    second = first[evenly_spread(len(first), int(0.49 * 64))]
    third = second[evenly_spread(len(second), int(0.343 * 64))]
    assert torch.equal(output.positions, third.expand(2, -1))
    assert output.decisions[0].nonzero()[:, 1].view(2, -1).equal(first.expand(2, -1))
    assert output.block_policy.mean() == 0.75
    assert torch.equal(output.block_policy[:, 0], output.block_policy[:, 1])


def test_random_policy() -> None:
    torch.manual_seed(0)
    model = small(pruning_policy="random", block_keep_ratio=0.75)
    x = images((64, 3, 32, 32), 2)
    with torch.no_grad():
        output = model.forward_with_decisions(x)
    shares = torch.stack(output.decisions).mean(2)
    assert torch.allclose(shares, torch.tensor([[44 / 64], [31 / 64], [21 / 64]]).expand(3, 64))
    assert (output.decisions[0].mean(0) - 0.7).abs().max() < 0.25
    assert len({tuple(row.tolist()) for row in output.positions}) > 60
    assert (output.block_policy.mean() - 0.75).abs() < 0.05


def test_predictor_inputs_reach_the_predictor() -> None:
    for name, width in (("hidden", 32), ("delta", 64), ("B", 16)):
        model = small(predictor_input=name)
        assert model.score_predictors[0].in_conv[0].normalized_shape == (width,)
    seen = []
    model = small(predictor_input="delta", pruning="token")
    model.score_predictors[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mixer, inputs = model.layers[1].mixer, []
    for proj in (mixer.x_proj, mixer.x_proj_b):
        proj.register_forward_hook(lambda module, args, out: inputs.append(out))
    with torch.no_grad():
        model(images((2, 3, 32, 32), 2))
        wanted = sum(F.softplus(dt(x[..., :2])) for dt, x in zip((mixer.dt_proj, mixer.dt_proj_b), inputs)) / 2
    assert relative_error(seen[0], split_cls(wanted, (32,))[1]) < 1e-5


def test_predictor_mean_leaves_dropped_tokens_out() -> None:
    predictor = fill_model(ScorePredictor(8, 16), 1)
    x, policy = images((2, 6, 8), 1), torch.tensor([[1.0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    changed = torch.where(policy.bool().unsqueeze(-1), x, x + 3)
    with torch.no_grad():
        assert torch.equal(predictor(x, policy)[0, [0, 1, 3]], predictor(changed, policy)[0, [0, 1, 3]])
        assert predictor(x, policy).isfinite().all()


def test_merging_works_with_block_pruning() -> None:
    model = small(pruning="block", fusion_strategy="all", fusion_token=4)
    x = images((2, 3, 32, 32), 2)
    inferred, trained = model.forward_with_decisions(x), model.train()(x)
    assert inferred.block_policy.shape == trained.block_policy.shape == (8, 2, 1, 2)
    assert inferred.tokens.shape[1] == 64 - 8 * 4
    teacher = fill_model(timm.create_model("vim_tiny_patch16_224", **PLAIN), 3)
    criterion = PruningLoss(_CrossEntropy(), teacher, model.methods.pruning)
    criterion(x, trained, torch.tensor([1, 2])).backward()
    assert "token_mse" not in criterion.parts


def test_gradient_checkpointing_changes_nothing() -> None:
    model = small(predictor_input="delta").train()
    x = images((2, 3, 32, 32), 2)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        with no_noise():
            model(x).logits.sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])


def test_parameters_that_a_step_may_not_reach_are_announced() -> None:
    assert small().find_unused_parameters
    assert not timm.create_model("vim_nano_patch4_32").find_unused_parameters


@pytest.mark.parametrize(("name", "millions"), [("tiny", 7.37), ("small", 26.6), ("base", 100.6)])
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"dyvm_{name}_patch16_224")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)


def test_class_tokens_where_images_differ() -> None:
    classes, patches = images((3, 2, 4), 1), images((3, 6, 4), 2)
    at = torch.tensor([[0, 7], [0, 1], [0, 4]])
    joined = join_cls(classes, patches, at)
    for b in range(3):
        assert torch.equal(joined[b, at[b]], classes[b])
    back = split_cls(joined, at)
    assert torch.equal(back[0], classes)
    assert torch.equal(back[1], patches)
    assert torch.equal(mean_over_kept(patches, torch.zeros(3, 6)), torch.zeros(3, 4))


# --- bad input ---


@pytest.mark.parametrize(
    ("keywords", "wanted"),
    [
        (dict(token_ratio=(0.7, 0.0, 0.0)), "keep ratio"),
        (dict(token_ratio=(1.2, 0.5, 0.4)), "keep ratio"),
        (dict(token_ratio=(float("nan"), 0.5, 0.4)), "keep ratio"),
        (dict(token_ratio=(0.5, 0.6, 0.4)), "do not rise"),
        (dict(block_keep_ratio=0.0), "keep ratio"),
        (dict(pruning_loc=(6, 6, 18)), "increasing"),
        (dict(pruning_loc=(12, 6, 18)), "increasing"),
        (dict(pruning_loc=(-1, 6, 18)), "increasing"),
        (dict(pruning_loc=(6, 12)), "one share a stage"),
        (dict(pruning_policy="best"), "pruning_policy"),
        (dict(predictor_input="C"), "predictor_input"),
        (dict(predictor_input="B", pruning_loc=(0, 6, 12)), "from 1 on"),
        (dict(spatial_pool=True), "pooling"),
        (dict(fusion_strategy="all", fusion_token=3), "merging"),
    ],
)
def test_bad_settings(keywords: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted) as error:
        Methods.from_keywords(**(dict(pruning="both") | keywords))
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keywords", "wanted"),
    [
        (dict(pruning_loc=(2, 4, 8)), "0 to 7"),
        (dict(use_middle_cls_token=False, if_cls_token=False, final_pool_type="none"), "final_pool_type"),
        (dict(if_bidirectional=True, pruning_loc=(1, 3, 5)), "even layers"),
    ],
)
def test_settings_that_do_not_fit_the_model(keywords: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        timm.create_model("dyvm_tiny_patch16_224", **(SMALL | keywords))


def test_decisions_of_a_model_that_prunes_nothing() -> None:
    with pytest.raises(ValueError, match="prunes nothing"):
        timm.create_model("vim_nano_patch4_32").forward_with_decisions(torch.zeros(1, 3, 32, 32))

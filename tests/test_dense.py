"""Maps of the dense backbone, adapters, loss, windows and the meter, held to what they say of themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

import benchmarks.micro_models  # noqa: F401 - their names join the registry
import engine
from benchmarks import segmentation
from fusion.dynamic_pruning import Choices
from models_mae import MaskedAutoencoder
from models_registry import registry_keywords
from tasks.dense.backbone import DenseBackbone, create_body, from_classifier, spread_indices
from tasks.dense.measure import SegmentationMeter
from tasks.dense.necks import MultiScale
from tasks.segment import SegmentationLoss, SegmenterOutput, build_segmenter, slide_inference
from tests.golden_rules import images, relative_error

NANO: dict[str, Any] = dict(depth=4, embed_dim=16)
SHARES = dict(pruning_loc=(1, 2), token_ratio=(0.5, 0.25))


def backbone(name: str, size: int | tuple[int, int] = 32, feature: str = "stream", **keywords: Any) -> DenseBackbone:
    torch.manual_seed(0)
    body = create_body(name, size, **(NANO | keywords))
    return DenseBackbone(body, range(4), feature).eval()


# --- images of any size ---


REGISTERED = dict(num_cls_tokens=3)


@pytest.mark.parametrize(
    "name",
    [
        "vim_nano_patch4_32",
        "fastvim_nano_patch4_32",
        "dyvm_nano_patch4_32",
        "mambareg_nano_patch4_32",
        "dyvm_mambareg_nano_patch4_32",
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (48, 20), (30, 41)])
def test_maps_of_any_size(name: str, size: tuple[int, int]) -> None:
    keywords = (SHARES if name.startswith("dyvm") else {}) | (REGISTERED if "mambareg" in name else {})
    model = backbone(name, **keywords)
    assert model.body.class_tokens.count == (3 if "mambareg" in name else 0)
    grid = tuple(math.ceil(side / 4) for side in size)
    x = images((2, 3, *size), 0)
    with torch.no_grad():
        maps = model(x)
        padded = model(F.pad(x, (0, grid[1] * 4 - size[1], 0, grid[0] * 4 - size[0])))
    assert [tuple(one.shape) for one in maps] == [(2, 16, *grid)] * 4
    for one, other in zip(maps, padded):
        assert torch.equal(one, other)
    assert model.padded_size(size) == (4 * grid[0], 4 * grid[1])


def test_overlapping_patches_of_a_padded_image() -> None:
    body = create_body("vim_nano_patch4_32", 32, patch_size=8, stride=4, **NANO)
    maps = DenseBackbone(body, [3])(images((1, 3, 30, 41), 0))
    assert maps[0].shape[-2:] == (7, 11)


def test_rotary_positions_of_any_size() -> None:
    model = backbone("vim_nano_patch4_32", if_rope=True)
    assert model(images((1, 3, 48, 20), 0))[0].shape[-2:] == (12, 5)
    same = create_body("vim_nano_patch4_32", (48, 20), if_rope=True, **NANO)
    assert torch.equal(model.body.rope._angles((12, 5)).cos(), same.rope.freqs_cos)


def test_feature_is_the_mixer_output_or_the_stream() -> None:
    hidden, stream = (backbone("vim_nano_patch4_32", feature=feature) for feature in ("hidden", "stream"))
    x = images((1, 3, 32, 32), 1)
    kept: list[Tensor] = []
    hidden.body.layers[2].mixer.register_forward_hook(lambda module, given, out: kept.append(out))
    with torch.no_grad():
        alone, summed = hidden(x), stream(x)
    assert torch.equal(alone[2].flatten(2).transpose(1, 2), kept[0])
    # the stream adds each mixer's output to what was there
    assert relative_error(summed[2] - summed[1], alone[2]) < 1e-5


def test_wrong_maps_are_refused() -> None:
    body = create_body("vim_nano_patch4_32", 32, **NANO)
    with pytest.raises(ValueError, match="from 0 to 3"):
        DenseBackbone(body, [1, 4])
    with pytest.raises(ValueError, match="hidden, stream"):
        DenseBackbone(body, [1], "residual")
    assert spread_indices(body) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="without pruning"):
        create_body("fastvim_nano_patch4_32", 32, pruning="block", **NANO)


# --- where methods change the sequence ---


def test_a_merged_patch_has_its_groups_token() -> None:
    model = backbone("vim_nano_patch4_32", fusion_strategy="all", fusion_token=9)
    x = images((2, 3, 32, 32), 2)
    states: list[Any] = []
    body = model.body
    state = body.embed(x)
    state = state.replace(groups=torch.arange(64).expand(2, -1))
    with torch.no_grad():
        body.encode(state, lambda index, state: states.append(state))
        maps = model(x)
    for one, state in zip(maps, states):
        tokens, cells = state.hidden + state.residual, one.flatten(2).transpose(1, 2)
        assert tokens.shape[1] < 64
        for image in range(2):
            assert torch.equal(cells[image], tokens[image, state.groups[image]])


def force(model: DenseBackbone, sets: list[Tensor], training: bool) -> None:
    """Keep the patches `sets` (B, k), a stage each, by index or, in training, by decision."""
    method = model.body.site_methods[0]
    method.direction_policy = None

    def policy(stage: int, tokens: Tensor, so_far: Tensor) -> Tensor:
        return torch.zeros_like(so_far).scatter(1, sets[stage], 1.0) if training else sets[stage]

    method.token_policy = policy
    model.train(training)


def test_a_dropped_patch_keeps_its_last_value_and_training_sees_what_inference_computes() -> None:
    model = backbone("dyvm_nano_patch4_32", **SHARES)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(64, generator=generator) for _ in range(2)])
    sets = [order[:, :32].sort().values, order[:, :16].sort().values]
    x = images((2, 3, 32, 32), 3)
    found = {}
    for training in (False, True):
        force(model, sets, training)
        with torch.no_grad():
            found[training] = [one.flatten(2).transpose(1, 2) for one in model(x)]
    for one, other in zip(found[False], found[True]):
        assert relative_error(one, other) < 1e-5
    for image in range(2):
        for stage, (before, after) in enumerate([(0, 1), (1, 2)]):
            gone = order[image, len(sets[stage][0]) :]
            for later in range(after, 4):
                assert torch.equal(found[False][later][image, gone], found[False][before][image, gone]) or stage == 1
            stays = sets[stage][image]
            assert not torch.isclose(found[False][after][image, stays], found[False][before][image, stays]).all()


def test_decisions_of_a_dense_body_are_those_of_a_classifier() -> None:
    """Where last values are kept, the predictor sees them all, and chooses among those still live all the same."""
    model = backbone("dyvm_nano_patch4_32", **SHARES)
    for parameter in model.body.score_predictors.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = images((3, 3, 32, 32), 4)
    with torch.no_grad():
        _, state = model.forward_with_state(x)
        plain = model.body.encode(model.body.embed(x))
    chosen, wanted = state.entry("pruning"), plain.entry("pruning", Choices())
    for one, other, keep in zip(chosen.decisions, wanted.decisions, (32, 16)):
        assert torch.equal(one, other)
        assert one.sum(1).tolist() == [keep] * 3


def test_pruning_counts_the_patches_of_the_image_in_hand() -> None:
    model = backbone("dyvm_nano_patch4_32", **SHARES)
    _, state = model.forward_with_state(images((1, 3, 48, 64), 5))
    assert [int(decision.sum()) for decision in state.entry("pruning").decisions] == [96, 48]


def test_gradient_reaches_the_predictors_from_live_and_from_dropped_patches() -> None:
    model = backbone("dyvm_nano_patch4_32", **SHARES).train()
    maps = model(images((2, 3, 32, 32), 6))
    maps[-1].sum().backward()
    for predictor in model.body.score_predictors:
        assert predictor.out_conv[0].weight.grad.abs().sum() > 0


# --- where weights come from ---


@pytest.mark.parametrize(
    "name",
    ["vim_nano_patch4_32", "fambav_nano_patch4_32", "fastvim_nano_patch4_32", "mambareg_nano_patch4_32"],
)
def test_a_body_starts_from_its_classifier(name: str) -> None:
    classifier = timm.create_model(name, img_size=32, **NANO).eval()
    body = create_body(name, 32, **NANO).eval()
    body.load_state_dict(from_classifier(classifier.state_dict(), body), strict=True)
    assert torch.equal(body.layers[0].mixer.in_proj.weight, classifier.layers[0].mixer.in_proj.weight)
    shared = classifier.class_token_positions(64) if classifier.class_tokens.positions == "shared" else ()
    rows = [row for row in range(classifier.pos_embed.shape[1]) if row not in shared]
    assert torch.equal(body.pos_embed, classifier.pos_embed[:, rows])


@pytest.mark.parametrize("name", ["vim_nano_patch4_32", "fastvim_nano_patch4_32"])
def test_a_body_starts_from_a_masked_autoencoder(name: str) -> None:
    sizes = dict(img_size=32, patch_size=4, **NANO)
    keywords = registry_keywords(name) | sizes | dict(num_classes=0)
    autoencoder = MaskedAutoencoder(**keywords, decoder_embed_dim=16, decoder_depth=1)
    body = create_body(name, 32, **NANO)
    body.load_state_dict(from_classifier(autoencoder.state_dict(), body), strict=True)
    assert torch.equal(body.pos_embed, autoencoder.pos_embed[:, autoencoder.num_prefix_tokens :])


def test_a_pruned_body_starts_from_a_plain_classifier() -> None:
    classifier = timm.create_model("vim_nano_patch4_32", **NANO)
    body = create_body("dyvm_nano_patch4_32", 64, **SHARES, **NANO)
    body.load_state_dict(from_classifier(classifier.state_dict(), body), strict=True)
    assert body.pos_embed.shape[1] == 256
    oblong = {"pos_embed": torch.zeros(1, 61, 16)}
    with pytest.raises(ValueError, match="square"):
        from_classifier(oblong, body)


# --- timm's backbones ---

PEERS = {
    "vit_tiny_patch16_224": dict(depth=4, embed_dim=24, num_heads=3),
    "swin_tiny_patch4_window7_224": dict(embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), window_size=4),
}


@pytest.mark.parametrize("name", PEERS)
def test_timm_backbones_under_the_same_head(name: str) -> None:
    model = build_segmenter(name, 5, img_size=64, channels=16, aux_channels=8, **PEERS[name])
    x = images((2, 3, 64, 64), 7)
    output = model.train()(x)
    assert output.logits.shape == (2, 5, 16, 16)
    output.logits.sum().backward()
    lost = [name for name, p in model.named_parameters() if p.grad is None and not name.startswith("auxiliary")]
    assert lost == []
    with torch.no_grad():
        assert model.eval()(images((1, 3, 80, 100), 8)).shape == (1, 5, 80, 100)
    body = model.backbone.body
    classifier = timm.create_model(name, num_classes=10, **PEERS[name])
    assert from_classifier(classifier.state_dict(), body).keys() <= body.state_dict().keys()


def test_layers_are_grouped_for_layer_decay() -> None:
    model = build_segmenter("vit_tiny_patch16_224", 5, img_size=64, channels=16, **PEERS["vit_tiny_patch16_224"])
    scales = engine.layer_scales(model, 0.5)
    assert scales["backbone.body.patch_embed.proj.weight"] == 0.5**5
    assert scales["backbone.body.blocks.0.attn.qkv.weight"] == 0.5**4
    assert scales["backbone.body.blocks.3.mlp.fc1.bias"] == 0.5
    assert scales["decode_head.conv_seg.weight"] == scales["neck.fpn2.0.weight"] == 1


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_maps_come_to_four_strides(stride: int) -> None:
    side = 64 // stride
    maps = MultiScale(8, stride)([images((1, 8, side, side), index) for index in range(4)])
    assert [one.shape[-1] for one in maps] == [16, 8, 4, 2]
    with pytest.raises(ValueError, match="wanted 4, 8 or 16"):
        MultiScale(8, 32)


def test_logits_of_a_padded_image_are_cut_in_training_too() -> None:
    model = build_segmenter("vim_nano_patch4_32", 3, img_size=32, **NANO)
    output = model.train()(images((2, 3, 32, 32), 0))
    assert (output.logits.shape[-2:], output.aux.shape[-2:]) == ((8, 8), (2, 2))
    output = model(images((2, 3, 30, 41), 0))
    assert output.logits.shape[-2:] == output.aux.shape[-2:] == (30, 41)


# --- loss, windows, meter ---


def test_loss_is_over_all_pixels_and_ignored_ones_have_no_gradient() -> None:
    logits = images((2, 3, 4, 4), 9).requires_grad_()
    labels = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    labels[:, 2:] = 255
    loss = SegmentationLoss()(SegmenterOutput(logits, None, [], None), labels)
    mean = F.cross_entropy(logits, labels, ignore_index=255)
    assert loss.item() == pytest.approx(mean.item() / 2, rel=1e-6)
    loss.backward()
    assert not logits.grad[:, :, 2:].any()
    assert logits.grad[:, :, :2].all()
    empty = SegmentationLoss()(SegmenterOutput(logits, None, [], None), torch.full_like(labels, 255))
    assert empty.item() == 0


def test_sliding_windows_equal_the_whole_where_one_fits() -> None:
    weight = images((5, 3, 3, 3), 10)

    def predict(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    x = images((2, 3, 20, 13), 11)
    assert torch.equal(slide_inference(predict, x, 20, 10), predict(x))
    seen: list[tuple[int, int]] = []
    slide_inference(lambda x: seen.append(tuple(x.shape[-2:])) or predict(x), x, 8, 5)
    assert set(seen) == {(8, 8)}
    assert len(seen) == 4 * 2
    for stride in (0, 9):
        with pytest.raises(ValueError, match="stride"):
            slide_inference(predict, x, 8, stride)


def test_meter_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    meter, truths, predictions = SegmentationMeter(6), [], []
    for size in ((9, 14), (3, 5), (20, 2)):
        truth = torch.randint(5, size, generator=generator)  # class 5 never comes
        prediction = torch.randint(5, size, generator=generator)
        truth[0] = 255
        truths.append(truth[1:].flatten())
        predictions.append(prediction[1:].flatten())
        meter.update(prediction, truth)
    counts = torch.from_numpy(confusion_matrix(torch.cat(truths), torch.cat(predictions), labels=range(6)))
    assert torch.equal(meter.counts, counts)
    hits = counts.diagonal().double()
    iou = 100 * hits / (counts.sum(0) + counts.sum(1) - hits)
    torch.testing.assert_close(meter.iou, iou, equal_nan=True)
    assert math.isnan(float(meter.iou[5]))
    assert meter.stats()["mIoU"] == pytest.approx(float(iou[:5].mean()))
    with pytest.raises(ValueError, match="class 6"):
        meter.update(torch.zeros(1), torch.full((1,), 6))


def test_benchmark_times_whole_and_body(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ("vim_micro_patch8_32", "fastvim_micro_patch8_32")
    flags = ["--models", *names, "--sizes", 32, "--seconds", 0, "--channels", 8, "--out", tmp_path / "rows.json"]
    assert segmentation.main([str(flag) for flag in flags]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in rows] == [*names]
    told = capsys.readouterr().out
    for row in rows:
        assert min(row["body_images_per_second"], row["images_per_second"]) > 0
        assert row["peak_bytes"] > 4 * row["parameters"]
        assert f"| 32 | {row['model']} |" in told

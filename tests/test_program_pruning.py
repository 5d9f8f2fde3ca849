"""Learned pruning from the program's side: fine-tuning, evaluation, pictures, several processes, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import main
from fusion.dynamic_pruning import DecisionMeter
from fusion.pruning_loss import PruningLoss, PruningOutput
from fusion.visualize_pruning import visualize_pruning
from measure.pruning import force_gates
from models_mamba import PUBLISHED_SPELLINGS, registry_name
from run import Run
from tasks import backbone
from tasks.classify.task import Classify
from tasks.task import Data
from tests.conftest import QUICK, Result, lines
from tests.golden_rules import fill_model, images

# the names of the micro models are registered by conftest's import
DYVM = (*QUICK, "--model", "dyvm_micro_patch8_32", "--data-set", "CIFAR", "--warmup-epochs", 0, "--no-model-ema")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, cifar: Path, vim_weights: Path) -> Path:
    """The output folder of an epoch of fine-tuning."""
    output = tmp_path_factory.mktemp("tuned")
    flags = (*DYVM, "--data-path", cifar, "--model-path", vim_weights, "--output_dir", output)
    assert main.main([str(flag) for flag in flags]) == 0
    return output


def test_fine_tuning_logs_the_loss_and_what_is_kept(tuned: Path) -> None:
    line = json.loads((tuned / "log.txt").read_text(encoding="utf-8"))
    names = ("classification", "token_ratio", "block_ratio", "logit_kl", "token_mse")
    assert sum(line[f"train_{name}"] for name in names) == pytest.approx(line["train_loss"], rel=1e-4)
    assert [line[f"test_kept_tokens_{stage}"] for stage in (1, 2, 3)] == [11 / 16, 7 / 16, 5 / 16]
    assert 0 <= line["test_kept_directions"] <= 1


def test_training_logs_what_it_keeps_while_the_noise_falls(
    cifar: Path, vim_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales, train, seen, loss = [], main.engine.train_one_epoch, [], PruningLoss.forward

    def noted(self: PruningLoss, samples: Tensor, outputs: PruningOutput, targets: Tensor) -> Tensor:
        shares = [*(decision.mean().item() for decision in outputs.decisions), outputs.block_policy.mean().item()]
        seen[-1].append((len(samples), shares))
        return loss(self, samples, outputs, targets)

    def epoch(run: Run, *rest: object) -> dict[str, float]:
        scales.append(run.model.site_methods[0].gate_noise)
        seen.append([])
        return train(run, *rest)

    monkeypatch.setattr(PruningLoss, "forward", noted)
    monkeypatch.setattr(main.engine, "train_one_epoch", epoch)
    flags = (*DYVM, "--data-path", cifar, "--model-path", vim_weights, "--epochs", 3, "--gate-noise-end", 0.5)
    flags += ("--output_dir", tmp_path, "--pruning-teacher", "logits")
    assert main.main([str(flag) for flag in flags]) == 0
    assert scales == [1.0, 0.75, 0.5]
    names = ["kept_tokens_1", "kept_tokens_2", "kept_tokens_3", "kept_directions"]
    events = EventAccumulator(str(tmp_path)).Reload()
    for line, batches in zip(lines(tmp_path), seen):
        assert "train_token_mse" not in line
        assert line["train_logit_kl"] > 0
        images = sum(count for count, _ in batches)
        for place, name in enumerate(names):
            mean = sum(count * shares[place] for count, shares in batches) / images
            assert line[f"train_{name}"] == pytest.approx(mean, rel=1e-6)
            assert events.Scalars(f"train/{name}")[line["epoch"]].value == pytest.approx(mean, rel=1e-5)
            assert len(events.Scalars(f"test/{name}")) == 3


def test_evaluation_compares_with_the_teacher(
    tuned: Path, program: Callable[..., Result], cifar: Path, vim_weights: Path, tmp_path: Path
) -> None:
    checkpoint = tuned / "checkpoint.pth"
    pictures = tmp_path / "pictures"
    flags = (*DYVM, "--data-path", cifar, "--eval")
    result = program(*flags, "--resume", checkpoint, "--model-path", vim_weights, "--visualize", pictures)
    assert result.code == 0, result.err
    assert "Kept tokens, stage by stage: 0.688, 0.438, 0.312 (wanted 0.700, 0.490, 0.343)" in result.out
    assert re.search(r"Scan directions that ran: [01]\.\d{3} \(wanted 0\.700\)", result.out)
    speed = re.search(r"Images/s at batch 12: ([\d.]+), unpruned ([\d.]+), ratio ([\d.]+)", result.out)
    assert float(speed[1]) / float(speed[2]) == pytest.approx(float(speed[3]), abs=0.01)
    assert len(re.findall(r"GFLOPs, (?:published convention|full): 0\.\d{3}, unpruned 0\.\d{3}", result.out)) == 2
    assert f"Unpruned ({vim_weights}): top-1" in result.out
    assert (pictures / "directions.png").stat().st_size > 0
    assert (pictures / "image_0" / "kept.png").stat().st_size > 0
    # the pruned model alone, as --model-path, gives the same
    alone = program(*flags, "--model-path", checkpoint)
    assert alone.code == 0, alone.err
    accuracy = re.compile(r"test images: (top-1 [\d.]+ %, top-5 [\d.]+ %, loss [\d.]+)")
    assert accuracy.search(alone.out)[1] == accuracy.search(result.out)[1]


def test_model_path_beside_finetune_is_the_teacher(vim_weights: Path, cifar: Path, tmp_path: Path) -> None:
    other = timm.create_model("vim_micro_patch8_32", num_classes=100)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    flags = (*DYVM, "--data-path", cifar, "--model-path", vim_weights, "--finetune", tmp_path / "other.pth")
    args = main.parse([str(flag) for flag in flags])
    data = Data(None, None, 100)
    model = Classify.build_model(args, data)
    teacher = main.load_weights(args, Classify, model, data)
    assert torch.equal(model.head.weight, other.head.weight)
    assert torch.equal(teacher.head.weight, torch.load(vim_weights)["model"]["head.weight"])
    assert not any("block_head" in name or "score" in name for name in teacher.state_dict())


@pytest.mark.parametrize("name", PUBLISHED_SPELLINGS)
def test_published_spellings(name: str, vim_weights: Path) -> None:
    args = main.parse(["--model", name, "--model-path", str(vim_weights), "--device=cpu", "--token-keep-ratio=0.9"])
    with torch.device("meta"):
        model = backbone.build_backbone(args, 1000)
    assert model.default_cfg["architecture"] == PUBLISHED_SPELLINGS[name]
    assert model.methods.pruning.token_ratio == pytest.approx((0.9, 0.81, 0.729))
    assert args.input_size == 224


def test_other_spellings_of_the_release() -> None:
    spelt = {"DyVM-Vim-S": "dyvm_small_patch16_224", "DyVM-VideoMamba-Middle": "dyvm_videomamba_middle_patch16_224"}
    spelt |= {"VimTeacher-Base": "vim_base_patch16_224", "MambaReg-S-Teacher": "mambareg_small_patch16_224"}
    assert {name: registry_name(name) for name in spelt} == spelt
    assert registry_name("Vim-Huge") == "Vim-Huge"


BAD = {
    "stages": ("--pruning-loc 2 1 3", "increasing"),
    "stage past the depth": ("--pruning-loc 1 2 4", "0 to 3"),
    "token ratio": ("--token-keep-ratio 0", "--token-keep-ratio is 0"),
    "no number": ("--token-keep-ratio nan", "--token-keep-ratio"),
    "block ratio": ("--block-keep-ratio 1.5", "keep ratio is 1.5"),
    "pooling": ("--spatial-pool row", "pooling"),
    "merging": ("--fusion-strategy all --fusion-token 1", "merging"),
    "predictor input": ("--predictor-input B --pruning-loc 0 1 2", "from 1 on"),
    "no pruning": ("--pruning none", "plain model"),
    "nothing to learn from": ("--model vim_micro_patch8_32 --pruning-teacher logits", "--pruning-teacher wants"),
    "class count": ("--model-path {classes}", "head.weight is (10, 32) instead of (100, 32)"),
    "size": ("--model-path {size}", "instead of"),
    "no teacher": ("--model-path {nothing}", "is no file"),
    "evaluation of an unpruned model": ("--eval", "block_head.weight is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, program: Callable[..., Result], cifar: Path, vim_weights: Path, tmp_path: Path) -> None:
    flags, *told = BAD[case]
    files = {name: tmp_path / f"{name}.pth" for name in ("classes", "size", "nothing")}
    for name, keywords in (("classes", dict(num_classes=10)), ("size", dict(num_classes=100, embed_dim=48))):
        if f"{{{name}}}" in flags:
            torch.save(timm.create_model("vim_micro_patch8_32", **keywords).state_dict(), files[name])
    output = tmp_path / "output"
    given = (*DYVM, "--data-path", cifar, "--model-path", vim_weights, "--output_dir", output)
    result = program(*given, *flags.format(**files).split())
    assert result.code == 2
    assert all(text in result.err for text in told), result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not output.exists()


# --- pictures and sums ---


def test_pictures_hold_what_was_decided(tmp_path: Path) -> None:
    model = fill_model(timm.create_model("dyvm_micro_patch8_32", token_ratio=(0.7, 0.5, 0.25)), 1).train()
    x = images((6, 3, 32, 32), 1)
    visualize_pruning(model, x, tmp_path)
    assert model.training
    output = model.eval().forward_with_decisions(x)
    for number in range(6):
        kept = np.load(tmp_path / f"image_{number}" / "kept.npz")["kept"]
        assert kept.shape == (3, 4, 4)
        assert np.array_equal(kept.reshape(3, 16), [decision[number] > 0 for decision in output.decisions])
        assert (kept[1:] <= kept[:-1]).all()
    share = np.load(tmp_path / "directions.npz")["share"]
    assert np.allclose(share, output.block_policy.mean((1, 2)))
    assert 0 < share.mean() < 1


def test_meter_adds_up_batches() -> None:
    model = timm.create_model("dyvm_micro_patch8_32").eval()
    ran = force_gates(model, 4, 0.75)
    meter = DecisionMeter(model)
    assert meter.shares() == {}
    x = images((4, 3, 32, 32), 1)
    with torch.no_grad():
        assert torch.equal(meter(x), model(x))
    meter(x)
    assert meter.sums[0] == 8
    assert float(meter.directions.mean()) == pytest.approx(ran) == pytest.approx(0.75)
    assert meter.shares()["kept_tokens_3"] == 5 / 16
    tokens_only = DecisionMeter(timm.create_model("dyvm_micro_patch8_32", pruning="token").eval())
    tokens_only(x)
    assert list(tokens_only.shares()) == ["kept_tokens_1", "kept_tokens_2", "kept_tokens_3"]


# --- several processes ---


def _steps_that_leave_parameters_unused(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = timm.create_model("dyvm_nano_patch4_32", depth=4, embed_dim=32, patch_size=8, pruning_loc=(1, 2, 3)).train()
    method = model.site_methods[0]
    trained = DistributedDataParallel(model, find_unused_parameters=model.find_unused_parameters)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    learned = method.token_policy, method.direction_policy
    for step in range(3):
        # this step of this process reaches no predictor, or no gate
        method.token_policy, method.direction_policy = learned
        if step == rank:
            method.token_policy = None
        if step == 2:
            method.direction_policy = None
        output = trained(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2 * step + rank)))
        optimizer.zero_grad()
        (output.logits.square().sum() + output.tokens.square().mean()).backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{results}/{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_parameters_that_stay_unused(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_steps_that_leave_parameters_unused, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any((value != 5).any() for name, value in first.items() if "block_head.bias" in name)

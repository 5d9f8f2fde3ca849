"""Random flags: a run or one sentence, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import QUICK, Result

NUMBERS = ["0", "1", "2", "0.5", "1e-5", "-1", "1e9", "nan", "inf", "", "x"]
WORDS = {
    "--model": ["vim_micro_patch8_32", "fambav_micro_patch8_32", "fastvim_micro_patch8_32", "test_vit", "vim_nan", ""],
    "--input-size": ["32", "33", "31", "8", "7", "40", "0"],
    "--batch-size": ["2", "5", "8", "64", "0"],
    "--data-set": ["DIGITS", "CIFAR", "CIFAR10", "IMNET", "INAT", "timm/folder/x", "timm/", "timm/torch/cifar100", "x"],
    "--opt": ["adamw", "sgd", "lion", "lamb", "muon", "adahessian", "rmsprop", "lookahead_sgd", "no"],
    "--sched": ["cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant", "none", "x"],
    "--aa": ["none", "rand-m9-mstd0.5-inc1", "v0", "original", "augmix-m3-w2", "3a", "rand", "rand-x", "x", ""],
    "--mixup-mode": ["batch", "pair", "elem", "half"],
    "--remode": ["const", "rand", "pixel", "x"],
    "--train-interpolation": ["random", "bilinear", "bicubic", "x"],
    "--distillation-type": ["none", "soft", "hard"],
    "--teacher-model": ["vim_micro_patch8_32", "x"],
    "--amp-dtype": ["bfloat16", "float16"],
    "--fusion-strategy": ["no", "all", "alternate", "interleaved", "lower", "upper"],
    "--fusion-order": ["published", "raster"],
    "--fusion-layer": ["-1", "0", "2", "4"],
    "--fusion-token": ["-1", "0", "3", "99"],
    "--spatial-pool": ["none", "alternate", "row", "col"],
    "--pool-method": ["mean", "max"],
    "--pruning": ["none", "token", "block", "both"],
    "--pruning-policy": ["learned", "static", "random"],
    "--predictor-input": ["hidden", "delta", "B"],
    "--resume": ["auto", "nowhere", "http://x/y.pth"],
    "--device": ["cpu", "meta", "x"],
    "--inat-category": ["genus", "x"],
}
SWITCHES = [
    *("--bce-loss", "--unscale-lr", "--no-model-ema", "--model-ema-force-cpu", "--no-repeated-aug", "--no-train-mode"),
    *("--ThreeAugment", "--src", "--resplit", "--cosub", "--attn-only", "--eval", "--dist-eval", "--no-pin-mem"),
    *("--distributed", "--if_amp", "--no_amp", "--if_continue_inf", "--if_nan2num", "--if_random_token_rank"),
    *("--if_random_cls_token_position", "--bi-merge", "--no-norm-after-ssm", "--deterministic", "--fsdp"),
]
VALUES = [
    *("--drop", "--drop-path", "--model-ema-decay", "--opt-eps", "--clip-grad", "--momentum", "--weight-decay", "--lr"),
    *("--lr-noise-pct", "--lr-noise-std", "--warmup-lr", "--min-lr", "--decay-epochs", "--warmup-epochs", "--dr"),
    *("--cooldown-epochs", "--patience-epochs", "--color-jitter", "--smoothing", "--reprob", "--recount", "--mixup"),
    *("--cutmix", "--mixup-prob", "--mixup-switch-prob", "--distillation-alpha", "--distillation-tau", "--seed"),
    *("--start_epoch", "--eval-crop-ratio", "--world_size", "--pool-scale", "--token-keep-ratio", "--num-classes"),
]
LISTS = ["--opt-betas", "--lr-noise", "--cutmix-minmax", "--pruning-loc"]

FLAG = st.one_of(
    st.sampled_from([[name, word] for name, words in WORDS.items() for word in words]),
    st.sampled_from([[name] for name in SWITCHES]),
    st.tuples(st.sampled_from(VALUES), st.sampled_from(NUMBERS)).map(list),
    st.tuples(st.sampled_from(LISTS), st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3)).map(
        lambda pair: [pair[0], *pair[1]]
    ),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(flags=st.lists(FLAG, min_size=1, max_size=6))
def test_a_run_or_one_sentence(
    flags: list[list[str]], program: Callable[..., Result], cifar: Path, vim_weights: Path, tmp_path: Path
) -> None:
    common = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--teacher-path", vim_weights]
    result = program(*common, *(part for flag in flags for part in flag), "--output_dir", tmp_path / "output")
    assert result.code in (0, 1, 2)
    assert (result.code == 0) == ("main.py: " not in result.err)
    assert sum(line.startswith("main.py: ") for line in result.err.splitlines()) <= 1
    assert "Traceback" not in result.err

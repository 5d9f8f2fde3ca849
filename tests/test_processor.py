"""What is said of a processor that does not multiply the type asked for."""

import argparse
import logging

import pytest
import torch
from mamba_ssm.kernels import products
from mamba_ssm.kernels.products import multiplies

import main

INFO = {
    "Zen 3": "processor\t: 0\nflags\t\t: fpu avx2 f16c\n\nprocessor\t: 1\nflags\t\t: fpu avx2 f16c\n",
    "Zen 4": "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n",
    "Sapphire Rapids": "flags\t\t: avx512_bf16 avx512_fp16 amx_tile amx_bf16\n",
    "Graviton 3": "Features\t: fp asimd asimdhp bf16\n",
    "unknown": "cpu : POWER10\n",
}


@pytest.mark.parametrize(
    ("name", "bfloat16", "float16"),
    [
        ("Zen 3", False, False),
        ("Zen 4", True, False),
        ("Sapphire Rapids", True, True),
        ("Graviton 3", True, True),
        ("unknown", True, True),
    ],
)
def test_types_that_a_processor_multiplies(name, bfloat16, float16):
    assert multiplies(torch.bfloat16, INFO[name]) == bfloat16
    assert multiplies(torch.float16, INFO[name]) == float16


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_the_program_says_that_amp_gains_nothing(native, asked, monkeypatch, caplog):
    monkeypatch.setattr(products, "WIDENED", set() if native else {torch.bfloat16})
    with caplog.at_level(logging.WARNING):
        main.tell_of_precision(argparse.Namespace(if_amp=asked, amp_dtype=None), torch.device("cpu"))
    told = [record.getMessage() for record in caplog.records]
    wanted = "--if_amp makes this processor slower, since it has no instructions that multiply bfloat16."
    assert told == ([wanted] if asked and not native else [])

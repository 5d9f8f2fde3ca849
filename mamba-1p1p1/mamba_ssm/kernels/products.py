"""Whose matrix product is the faster one here, and what the processor multiplies at all.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's: this
package's own product takes 50 to 95 % of its time there. oneDNN is as fast, but torch has no public way to it for
float32, and it keeps code for every sequence length that it has met, more than a method that shortens sequences saves.
"""

from pathlib import Path

import torch

# Instructions that multiply numbers of a type, as /proc/cpuinfo names them on x86 and on aarch64.
_INSTRUCTIONS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def multiplies(dtype: torch.dtype, info: str) -> bool:
    """Whether a processor of which the system says `info`, the text of /proc/cpuinfo, multiplies bfloat16 or float16
    by itself; True where the text does not tell."""
    lines = [line.partition(":") for line in info.splitlines()]
    known = [set(words.split()) for name, _, words in lines if name.strip() in ("flags", "Features")]
    return not known or bool(_INSTRUCTIONS[dtype] & known[0])


_INFO = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
# torch multiplies these number by number here, some ten times slower than float32: their products are taken in float32,
# and rounded once.
WIDENED = {dtype for dtype in _INSTRUCTIONS if not multiplies(dtype, _INFO)}
_MKL_ON_AMD = torch.backends.mkl.is_available() and "AuthenticAMD" in _INFO

# MKL takes AVX2 on AMD: half of what AVX-512 of full width multiplies, and a tenth less than ours on Zen 4.
PREFER_OWN = _MKL_ON_AMD and "AVX512" in torch.backends.cpu.get_cpu_capability()
# With AVX2 alone it is as fast, but for matrices that are narrow on one side: half as fast where that side is 12.
PREFER_OWN_NARROW = _MKL_ON_AMD
NARROW = 64
# Smaller products are over before ours has been called.
MIN_MULTIPLICATIONS = 1 << 20

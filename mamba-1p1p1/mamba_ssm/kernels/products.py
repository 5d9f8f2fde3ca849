"""Whose matrix product is the faster one here.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's: this
package's own product takes half the time there. oneDNN is as fast, but torch has no public way to it for float32, and
it keeps code for every sequence length that it has met, more than a method that shortens sequences saves.
"""

from pathlib import Path

import torch


def _mkl_on_amd() -> bool:
    """Whether torch multiplies with MKL on a processor that it was not made for."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.is_file() and "AuthenticAMD" in info.read_text(encoding="utf-8")


# MKL leaves half of the vector units of AMD's AVX-512 unused.
PREFER_OWN = _mkl_on_amd() and "AVX512" in torch.backends.cpu.get_cpu_capability()
# With AVX2 alone it is as fast, but for matrices that are narrow on one side: half as fast where that side is 12.
PREFER_OWN_NARROW = _mkl_on_amd()
NARROW = 64
# Smaller products are over before ours has been called.
MIN_MULTIPLICATIONS = 1 << 20

"""Whose matrix product is the faster one here.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's: this
package's own product takes half the time there. oneDNN is as fast, but torch has no public way to it for float32, and
it keeps code for every sequence length that it has met, more than a method that shortens sequences saves.
"""

from pathlib import Path

import torch


def _mkl_is_slow_here() -> bool:
    """Whether torch's products leave half of this processor's vector units unused."""
    info = Path("/proc/cpuinfo")
    amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return torch.backends.mkl.is_available() and amd and "AVX512" in torch.backends.cpu.get_cpu_capability()


PREFER_OWN = _mkl_is_slow_here()
# Smaller products are over before ours has been called.
MIN_MULTIPLICATIONS = 1 << 20

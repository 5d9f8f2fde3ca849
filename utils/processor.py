"""What the processor multiplies by itself."""

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

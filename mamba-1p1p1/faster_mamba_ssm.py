"""Names of `mamba_ssm` under FastVim's name for its copy of it; `pooled_selective_scan_fn` is the scan that it adds."""

from mamba_ssm.modules.mamba_simple_faster import Mamba
from mamba_ssm.ops.selective_scan_interface import (
    FastVim_mamba_inner_fn_no_out_proj_withoutZ,
    mamba_inner_fn,
    pooled_selective_scan_fn,
    selective_scan_fn,
)

__all__ = [
    "FastVim_mamba_inner_fn_no_out_proj_withoutZ",
    "Mamba",
    "mamba_inner_fn",
    "pooled_selective_scan_fn",
    "selective_scan_fn",
]

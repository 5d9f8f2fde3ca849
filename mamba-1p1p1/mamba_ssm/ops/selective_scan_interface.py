"""The published import path of the selective scan and of the functions around it."""

from mamba_ssm.ops.inner import (
    FastVim_mamba_inner_fn_no_out_proj_withoutZ,
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_fn_no_out_proj_ref,
    mamba_inner_ref,
)
from mamba_ssm.ops.scan import (
    pooled_selective_scan_fn,
    pooled_selective_scan_ref,
    selective_scan_fn,
    selective_scan_ref,
)

__all__ = [
    "BiMambaInnerFn",
    "FastVim_mamba_inner_fn_no_out_proj_withoutZ",
    "MambaInnerFn",
    "MambaInnerFnNoOutProj",
    "SelectiveScanFn",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_fn_no_out_proj_ref",
    "mamba_inner_ref",
    "pooled_selective_scan_fn",
    "pooled_selective_scan_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]


class SelectiveScanFn:
    """The published class, of which others call `apply`."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """The published class, of which others call `apply`."""

    apply = staticmethod(mamba_inner_fn)


class MambaInnerFnNoOutProj:
    """The published class, of which others call `apply`."""

    apply = staticmethod(mamba_inner_fn_no_out_proj)


class BiMambaInnerFn:
    """The published class, of which others call `apply`."""

    apply = staticmethod(bimamba_inner_fn)

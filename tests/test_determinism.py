"""What a training step asks of torch on CUDA has one result: listed on the CPU, with a kernel set in CUDA's place.

torch refuses some operations where deterministic ones are asked for (`torch.use_deterministic_algorithms`), and adds
others up as threads come along, which is one result only where no two land in one place.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from causal_conv1d.kernels import registry as conv_registry
from causal_conv1d.kernels import torch as torch_conv
from causal_conv1d.kernels.cuda import convolution
from mamba_ssm.kernels import cuda as cuda_kernels
from mamba_ssm.kernels import registry
from mamba_ssm.kernels import torch as torch_kernels
from mamba_ssm.ops import merging
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import micro_models  # noqa: F401 - its models join the registry

# What raises on CUDA (documentation of `torch.use_deterministic_algorithms`), as far as a model could have it.
REFUSED = (
    *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("reflection_pad2d_backward", "replication_pad2d_backward", "grid_sampler_2d_backward", "nll_loss2d_backward"),
    *("kthvalue", "median", "histc", "put_", "_ctc_loss_backward", "max_unpool2d", "scatter_reduce"),
)


class Listed(TorchDispatchMode):
    """Lists the operations that have no one result on CUDA; looks into no operator of the kernel packages."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name in REFUSED or (name in ("cumsum", "cumsum_") and args[0].dtype.is_floating_point):
            self.found.append(name)
        if name.startswith(("scatter_add", "index_add")) and args[0].is_floating_point():
            self._expect_apart(name, torch.zeros_like(args[0]), args[1], args[2])
        if name.startswith(("index_put", "_index_put_impl")) and (kwargs.get("accumulate") or True in args[3:4]):
            places = torch.zeros_like(args[0], dtype=torch.float32)
            ones = torch.ones_like(args[2], dtype=torch.float32)
            if torch.ops.aten.index_put.default(places, args[1], ones, True).max() > 1:
                self.found.append(name)
        return func(*args, **kwargs)

    def _expect_apart(self, name: str, places: Tensor, dim: int, index: Tensor) -> None:
        if name.startswith("index_add"):
            several = index.numel() and index.bincount().max() > 1
        else:
            several = (places.scatter_add(dim, index, torch.ones_like(index, dtype=places.dtype)) > 1).any()
        if several:
            self.found.append(name)


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel set with the functions that CUDA's has, computed by torch's and the references."""
    own = {name: getattr(torch_kernels, name) for name in cuda_kernels.__all__ if hasattr(torch_kernels, name)}
    own |= {"match_tokens": merging.match_tokens_ref, "merge_tokens": merging.merge_tokens_ref}
    own |= {"merge_tokens_backward": merging._merge_backward_reference, "MISSED": {}}
    convs = {name: getattr(torch_conv, name) for name in ("conv_forward", "conv_backward")}
    convs["conv_forward_masked"] = convolution._masked_forward_by_torch
    convs["conv_backward_masked"] = convolution._masked_backward_by_torch
    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): SimpleNamespace(**own)})
    monkeypatch.setattr(conv_registry.backends, "_loaded", {("cpu", None): SimpleNamespace(**convs)})


MODELS = {
    "Vim": ("vim", {}),
    "Famba-V": ("fambav", {"fusion_strategy": "all", "fusion_token": 3}),
    "Famba-V, raster": ("fambav", {"fusion_strategy": "all", "fusion_token": 3, "fusion_order": "raster"}),
    "Famba-V, weighted": ("fambav", {"fusion_strategy": "all", "fusion_token": 3, "fusion_weighted": True}),
    "FastVim": ("fastvim", {}),
    "DyVM": ("dyvm", {}),
    "MambaReg": ("mambareg", {}),
    "MAE": ("mae_vim", {}),
    "MAE, FastVim": ("mae_fastvim", {}),
}


@pytest.mark.usefixtures("like_cuda")
@pytest.mark.parametrize("case", MODELS)
def test_a_training_step_has_one_result(case: str) -> None:
    family, keywords = MODELS[case]
    torch.manual_seed(0)
    model = timm.create_model(f"{family}_micro_patch8_32", **keywords).train()
    with Listed() as listed:
        results = model(torch.randn(2, 3, 32, 32))
        sum(
            each.float().sum() for each in tree_leaves(results) if torch.is_tensor(each) and each.requires_grad
        ).backward()
    assert listed.found == []


def test_what_has_no_one_result_is_listed() -> None:
    x, index = torch.randn(2, 5, 4, requires_grad=True), torch.tensor([[0, 0, 1], [1, 2, 3]])
    with Listed() as listed:
        x.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)).sum().backward()
        x[:, torch.tensor([1, 1])].sum().backward()
        x.cumsum(1)
        x.gather(1, index[1:].expand(2, -1).unsqueeze(-1).expand(-1, -1, 4)).sum().backward()  # all apart

    assert len(listed.found) == 3

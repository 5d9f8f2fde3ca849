"""When a module may be bypassed: its weights used without calling it."""

from __future__ import annotations

import torch.nn.modules.module as torch_module
from mamba_ssm.modules.linear import Linear
from mamba_ssm.ops.triton.layernorm import RMSNorm
from torch import nn

_KINDS = (Linear, RMSNorm, nn.Linear, nn.Conv1d, nn.LayerNorm)


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs the `forward` of `kind` and nothing else: no other one, not compiled, no hooks but
    those of all modules, of which `is_plain` knows."""
    if type(module).forward is not kind.forward or "forward" in module.__dict__ or module._compiled_call_impl:
        return False
    return not _has_hooks(module)


def is_plain(*modules: nn.Module | None) -> bool:
    """Whether calling each of these does what its class says and nothing else.

    Not so for a module of another class (an adapter around it, a quantised or parametrised one), with a `forward` of
    its own, or with hooks (a pruned one has some), be they its own or those of all modules.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return False
    for module in modules:
        if module is None:
            continue
        if type(module) not in _KINDS or "forward" in module.__dict__:
            return False
        if _has_hooks(module):
            return False
    return True


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

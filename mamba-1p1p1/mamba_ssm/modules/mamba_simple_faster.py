"""FastVim's import path of the mixer, which scans both ways unless told otherwise."""

from mamba_ssm.modules.mamba_simple import Block, DynamicMamba

__all__ = ["Block", "DynamicMamba", "Mamba"]

Mamba = DynamicMamba

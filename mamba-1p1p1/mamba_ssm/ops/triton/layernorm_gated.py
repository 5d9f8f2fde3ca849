"""Where the gated norm of Mamba 2 would be."""

raise ImportError("this mamba_ssm has no gated norm, which Mamba 2 has: it has layer_norm's RMSNorm")

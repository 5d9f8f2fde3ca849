"""Where the mixer of Mamba 2 would be."""

raise ImportError("this mamba_ssm has no Mamba2: it has mamba_simple's Mamba, the mixer of the first paper")

"""Where the plain mixer of Mamba 2 would be."""

raise ImportError("this mamba_ssm has no Mamba2Simple: it has mamba_simple's Mamba, the mixer of the first paper")

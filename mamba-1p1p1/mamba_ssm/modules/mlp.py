"""Where the MLP of mixed language models would be."""

raise ImportError("this mamba_ssm has no MLP: it has mamba_simple's Mamba, the mixer of the first paper")

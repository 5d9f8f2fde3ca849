"""Where the attention of mixed language models would be."""

raise ImportError("this mamba_ssm has no attention: it has mamba_simple's Mamba, the mixer of the first paper")

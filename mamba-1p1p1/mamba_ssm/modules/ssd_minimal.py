"""Where the short scan of Mamba 2 would be."""

raise ImportError("this mamba_ssm has no scan of Mamba 2: it has selective_scan_ref, that of the first paper")

"""Where a part of the scan of Mamba 2 would be."""

raise ImportError("this mamba_ssm has no scan of Mamba 2: it has selective_scan_fn, that of the first paper")

"""Speed, memory and multiply-adds, side by side with peers; each module runs with `python -m benchmarks.NAME`."""

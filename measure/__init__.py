"""Time, memory, multiply-adds and the machine: what the program's reports and `benchmarks/` alike measure with."""

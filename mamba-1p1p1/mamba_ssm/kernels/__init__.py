"""What computes the operators: one package a backend, one file an operator in each, and `registry`, which chooses."""

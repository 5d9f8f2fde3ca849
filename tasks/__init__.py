"""What the program can train a backbone for."""

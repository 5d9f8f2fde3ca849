"""The tasks that a Vision Mamba can be trained for."""

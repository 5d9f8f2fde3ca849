"""Import the installed packages before pytest gives their names to the folders of the same name."""

import causal_conv1d  # noqa: F401
import mamba_ssm  # noqa: F401

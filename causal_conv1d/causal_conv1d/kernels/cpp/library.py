"""This package's C++ library."""

from pathlib import Path

from causal_conv1d.native import Library

LIBRARY = Library(Path(__file__).resolve().parents[2])

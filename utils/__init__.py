"""Small helpers of the program, a room each; the errors are known by all."""

from utils.errors import PeerError, RunError, UsageError, first_line, nearest

__all__ = ["PeerError", "RunError", "UsageError", "first_line", "nearest"]

"""A stand-in for MagiAttention 1.1.1, for tests on machines without a GPU; see api.py."""

__version__ = "stand-in"

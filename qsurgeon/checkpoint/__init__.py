"""Checkpoints on disk: their files, and rewriting one folder into another."""

from qsurgeon.checkpoint.files import read_headers, weight_files
from qsurgeon.checkpoint.rewrite import rewrite

__all__ = ["read_headers", "rewrite", "weight_files"]

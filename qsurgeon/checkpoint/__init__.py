"""Checkpoints: their files, on disk and on the hub, and rewriting one folder into another."""

from qsurgeon.checkpoint.files import read_headers, weight_files
from qsurgeon.checkpoint.hub import Source, fetch, fetch_config, origin, push, reserve
from qsurgeon.checkpoint.rewrite import rewrite
from qsurgeon.checkpoint.saving import carry_cards

__all__ = [
    "Source",
    "carry_cards",
    "fetch",
    "fetch_config",
    "origin",
    "push",
    "read_headers",
    "reserve",
    "rewrite",
    "weight_files",
]

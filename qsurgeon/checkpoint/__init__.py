"""Checkpoints: their files, on disk and on the Hub, and rewriting one folder into another."""

from qsurgeon.checkpoint.hub import Source, config_of, fetch, fetch_config, origin, push, reserve
from qsurgeon.checkpoint.reading.gate import BAD_ADAPTER, check_adapter, check_checkpoint
from qsurgeon.checkpoint.reading.headers import Header, Tensor, read_header
from qsurgeon.checkpoint.reading.index import read_headers, weight_files
from qsurgeon.checkpoint.reading.quantized import refuse_quantized_weight
from qsurgeon.checkpoint.rewrite import Options, rewrite
from qsurgeon.checkpoint.writing.progress import Estimate, Events

__all__ = [
    "BAD_ADAPTER",
    "Estimate",
    "Events",
    "Header",
    "Options",
    "Source",
    "Tensor",
    "check_adapter",
    "check_checkpoint",
    "config_of",
    "fetch",
    "fetch_config",
    "origin",
    "push",
    "read_header",
    "read_headers",
    "refuse_quantized_weight",
    "reserve",
    "rewrite",
    "weight_files",
]

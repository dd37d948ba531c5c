"""Measures quantizers while a model trains: for any loop, and for transformers' Trainer."""

from qsurgeon.watch.trainer import WatchCallback
from qsurgeon.watch.training import Watch

__all__ = ["Watch", "WatchCallback"]

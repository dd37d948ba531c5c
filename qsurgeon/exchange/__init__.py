"""Checkpoints of other tools: what qsurgeon wrote becomes theirs, and theirs become ours, without rounding twice."""

from qsurgeon.exchange.engines import ENGINES, Computed
from qsurgeon.exchange.exporting import TARGETS, Export, ExportOptions, export

__all__ = ["ENGINES", "TARGETS", "Computed", "Export", "ExportOptions", "export"]

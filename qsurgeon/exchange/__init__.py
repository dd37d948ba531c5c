"""Checkpoints of other tools: what qsurgeon wrote becomes theirs, and theirs become ours, without rounding twice."""

from qsurgeon.exchange.engines import ENGINES, Computed
from qsurgeon.exchange.exporting import TARGETS, Export, ExportOptions, export
from qsurgeon.exchange.importing import Imported, ImportOptions, import_checkpoint

__all__ = [
    "ENGINES",
    "TARGETS",
    "Computed",
    "Export",
    "ExportOptions",
    "ImportOptions",
    "Imported",
    "export",
    "import_checkpoint",
]

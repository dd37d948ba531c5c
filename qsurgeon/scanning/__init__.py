"""Which layers rounding hurts: measured on weights, on real inputs, on outputs, and on what the whole model says."""

from qsurgeon.scanning.choices import RECIPE, Choice
from qsurgeon.scanning.measures import CAUSES, Sums, measure, reference, total
from qsurgeon.scanning.result import OPERANDS, Data, Effect, Output, Row, Scan
from qsurgeon.scanning.running import scan

__all__ = [
    "CAUSES",
    "OPERANDS",
    "RECIPE",
    "Choice",
    "Data",
    "Effect",
    "Output",
    "Row",
    "Scan",
    "Sums",
    "measure",
    "reference",
    "scan",
    "total",
]

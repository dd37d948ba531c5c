"""Which layers rounding hurts: measured on weights, on real inputs, on outputs, and on what the whole model says."""

from qsurgeon.scanning.choices import RECIPE, Choice
from qsurgeon.scanning.measures import CAUSES, Sums, measure, reference, total
from qsurgeon.scanning.result import ALONE, OPERANDS, WITHOUT, Data, Effect, Output, Row, Scan
from qsurgeon.scanning.running import scan
from qsurgeon.scanning.suggest import Suggestion, cost, suggest_bits, suggest_exclude

__all__ = [
    "ALONE",
    "CAUSES",
    "OPERANDS",
    "RECIPE",
    "WITHOUT",
    "Choice",
    "Data",
    "Effect",
    "Output",
    "Row",
    "Scan",
    "Suggestion",
    "Sums",
    "cost",
    "measure",
    "reference",
    "scan",
    "suggest_bits",
    "suggest_exclude",
    "total",
]

"""Reports: what a model computes with, as rows, tables and JSON."""

from qsurgeon.report.inspection import inspect, report_of
from qsurgeon.report.rows import Report, Row, report_text
from qsurgeon.report.tables import rendered

__all__ = ["Report", "Row", "inspect", "rendered", "report_of", "report_text"]

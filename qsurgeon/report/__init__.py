"""Reports: what a model computes with, as rows, tables and JSON."""

from qsurgeon.report.inspection import inspect, report_of
from qsurgeon.report.rows import Report, Row
from qsurgeon.report.tables import rendered, report_text

__all__ = ["Report", "Row", "inspect", "rendered", "report_of", "report_text"]

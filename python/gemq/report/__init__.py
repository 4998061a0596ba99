"""``gemq report``: one HTML page, and pictures, of what quantizing did to a model."""

from gemq.report.data import ReportData, load
from gemq.report.page import render
from gemq.report.writing import write_pictures, write_report

__all__ = ["ReportData", "load", "render", "write_pictures", "write_report"]

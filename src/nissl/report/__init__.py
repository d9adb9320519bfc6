"""Figures, and the audit as one HTML file that needs nothing else."""

from nissl.report.figures import plot
from nissl.report.html import write_report
from nissl.report.thoughts import thoughts_figure, thoughts_page, write_thoughts

__all__ = ["plot", "thoughts_figure", "thoughts_page", "write_report", "write_thoughts"]

"""Figures, and the audit as one HTML file that needs nothing else."""

from nissl.report.figures import plot
from nissl.report.html import write_report

__all__ = ["plot", "write_report"]

"""Figures, and the audit as one HTML file that needs nothing else."""

from nissl.report.agreement import agreement_figure
from nissl.report.figures import plot
from nissl.report.html import write_report
from nissl.report.neurons import neurons_page, write_neurons
from nissl.report.thoughts import thoughts_figure, thoughts_page, write_thoughts

__all__ = [
    "agreement_figure", "neurons_page", "plot", "thoughts_figure", "thoughts_page", "write_neurons", "write_report",
    "write_thoughts",
]  # fmt: skip

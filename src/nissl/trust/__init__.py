"""Checks of explanations: faithfulness, sanity, ground truth, stability, agreement; and the audit that joins them."""

from nissl.trust.groundtruth import DiFull, DiPart, GridPG

__all__ = ["DiFull", "DiPart", "GridPG"]

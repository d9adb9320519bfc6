"""Checks of explanations: faithfulness, sanity, ground truth, stability, agreement; and the audit that joins them."""

from nissl.trust.agreement import AttributionAgreement, compare_maps
from nissl.trust.groundtruth import DiFull, DiPart, GridPG

__all__ = ["AttributionAgreement", "DiFull", "DiPart", "GridPG", "compare_maps"]

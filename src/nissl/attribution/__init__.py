"""Which units are responsible: methods that score the units of a site."""

from nissl.attribution.base import Method
from nissl.attribution.gradients import (
    ExpectedGradients,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
    VarGrad,
)

__all__ = ["ExpectedGradients", "InputXGradient", "IntegratedGradients", "Method", "Saliency", "SmoothGrad", "VarGrad"]

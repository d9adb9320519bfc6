"""Changing networks: what happens when units, directions or weights are changed."""

from nissl.intervention.calibration import Calibrated, calibrate, divergence

__all__ = ["Calibrated", "calibrate", "divergence"]

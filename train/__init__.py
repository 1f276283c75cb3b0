"""Fitting, calibration and publishing of SpecBound exit heads. Needs the `train` extra."""

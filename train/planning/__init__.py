"""Estimates of the memory, disk and hours of a fit, before it is run."""

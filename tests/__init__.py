"""Tests of SpecBound; folders mirror the packages."""

"""Measurements: one file each, the last line of output is JSON."""

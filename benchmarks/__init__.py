"""Measurements. Ratios of one run on one machine; results are kept in `results/`."""

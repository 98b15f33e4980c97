"""Convoy beside the servers that people compare it with, on the same bundles, images, processors and load."""

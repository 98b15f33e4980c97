"""Checks of a data set before it is trained on: broken and odd files, duplicates, leaks, suspect labels."""

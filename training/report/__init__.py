"""The report: one HTML file that tells of a run or an evaluation, and needs nothing beside itself.

`markup.py` makes elements with their text escaped, `charts.py` draws, `sections.py` lays out, `page.py` puts together
what a browser opens. None of them computes a figure that is not of the drawing itself.
"""

"""Measuring a running service from outside: load, its figures, the bare loop beside it, and the search for settings.

Speaks HTTP to the service like any client, and knows nothing of its insides. As a library: build a `Plan`, await
`run_load(plan)` (or call `measure(plan)`), and read the `Report`.
"""

"""Computing cost: INT8, FP16, pruning and distillation, each beside its parent in one table, or not at all.

`int8.py` and `fp16.py` turn one graph into another, `pruning.py` and `distilling.py` train; `speed.py` measures,
`table.py` compares and refuses, `bundles.py` writes what passed.
"""

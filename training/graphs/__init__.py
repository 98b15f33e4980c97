"""ONNX graphs: written by PyTorch, read, cut and given another end.

`exporter` makes one of a module. `parts` reads and keeps nodes of any. `cut` divides one before its last linear layer
and grafts a new head onto it. `ending` puts temperature and energy behind its logits. Only `exporter` knows PyTorch;
nobody here knows images, labels or bundles.
"""

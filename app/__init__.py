"""Convoy's service: ONNX bundles in, labels and probabilities out over HTTP."""

__version__ = "0.1.0"

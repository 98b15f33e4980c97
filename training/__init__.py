"""Convoy's training: images in, bundles out."""

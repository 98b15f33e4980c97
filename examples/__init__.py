"""Small networks that are not image classifiers, trained on the spot: what they export is served as plain tensors."""

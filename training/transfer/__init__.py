"""Learning from what another model has learned: weights to begin from, or only a new last layer.

`backbones` finds weights in runs, bundles and files and proves them. `fewshot` makes a bundle for new classes out of
another's features, with the mathematics of `heads`. Which layers then move is `training/learning/freezing.py`'s.
"""

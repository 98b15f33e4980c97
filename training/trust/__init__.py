"""Probabilities that mean what they say: temperature, label sets, energy, and what traffic is compared with.

`calibration`, `conformal`, `energy` and `reference` are arrays in, numbers out. `fitted` says which images each is
fitted and measured on; `calibrate` goes from a bundle's graph to the calibrated one.
"""

"""What a training is made of beside its loop, which is `training/train.py`: steps, rates, averages, processes, devices.

Knows neither data sets nor files.
"""

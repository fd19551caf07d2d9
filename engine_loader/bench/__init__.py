"""Measures how fast a checkpoint is read into parameters by plain reads (the limit), this package and other loaders.

``engine-loader bench read`` and ``benchmarks/read.py`` run these measurements.
"""

"""Measures how fast a checkpoint's bytes reach parameters: by plain reads (the limit), by us, by other loaders.

``engine-loader bench read`` and ``benchmarks/read.py`` are two doors to it.
"""

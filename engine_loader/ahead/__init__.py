"""Weights that are read past the page cache, read into memory while an engine imports. See docs/start.md."""

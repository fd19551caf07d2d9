"""Where bytes are read from: one small protocol (source.py), one module for each kind of storage."""

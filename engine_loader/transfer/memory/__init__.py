"""Memory that bytes are read into: pooled buffers, huge pages, guarded mappings."""

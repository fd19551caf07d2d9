"""Where bytes are: one small protocol, one file a kind of place."""

"""Where packs are kept: a file system or an object store."""

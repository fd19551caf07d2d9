"""The steps of a restore: find missing files, unpack them into staging directories, rename them into the caches."""

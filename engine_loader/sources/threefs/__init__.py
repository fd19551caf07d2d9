"""3FS as a source: files that are read over USRBIO."""

"""The reader threads in pure Python."""

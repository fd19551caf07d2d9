"""The window: memory that the ranks of a machine share, so that what several of them need is read once."""

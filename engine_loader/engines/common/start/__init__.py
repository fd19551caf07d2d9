"""The account of a start, the part that all engines share."""

"""Starts read back: their timelines, what of them the time to ready depended on, and what is made of that."""

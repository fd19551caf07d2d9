"""Restore before warm-up and save after it, in processes of their own."""

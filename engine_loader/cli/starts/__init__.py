"""Commands about the starts of engines."""

"""What the adapters for both engines share."""

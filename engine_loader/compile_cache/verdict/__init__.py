"""What a restored cache was good for, and why it was no hit."""

"""What every command shows and how it ends."""

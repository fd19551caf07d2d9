"""What people and repairs do about packs that are bad."""

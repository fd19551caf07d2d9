"""File formats of checkpoints. Parsers take bytes and return checked descriptions; they do no I/O."""

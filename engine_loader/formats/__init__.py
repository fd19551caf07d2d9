"""What the bytes mean. Parsers take bytes and give checked descriptions; they do no IO."""

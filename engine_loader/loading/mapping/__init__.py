"""``key_mapping`` that does more than rename: rules that reorder, cut and join tensors, and the built-in ones."""

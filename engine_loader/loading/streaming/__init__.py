"""Streaming: blocks of consecutive tensors are read ahead of the consumer."""

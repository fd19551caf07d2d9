"""How tensors reach a model: opened checkpoints, streams of (name, tensor) pairs, reads straight into memory."""

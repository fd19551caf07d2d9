"""Hugging Face checkpoints through torch.distributed.checkpoint: the reader, the writer, and consolidation."""

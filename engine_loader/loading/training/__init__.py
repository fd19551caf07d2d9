"""Training checkpoints: the items of torch.distributed.checkpoint, served as tensors."""

"""A plugin of pytest: safetensors' safe_open and load_file are this package's."""

import safetensors
import safetensors.torch

from engine_loader.compat.safetensors_files import load_file, safe_open

safetensors.safe_open = safe_open
safetensors.torch.safe_open = safe_open
safetensors.torch.load_file = load_file

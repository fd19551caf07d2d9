"""Stands in for the binding hf3fs_py_usrbio: its functions and classes, over the emulator that TEST_EMULATOR names."""

import os
from pathlib import Path

from engine_loader.sources.threefs.rings import Rings
from engine_loader.sources.threefs.shared_library import load_library

_rings = Rings(load_library(Path(os.environ["TEST_EMULATOR"])))
extract_mount_point = _rings.extract_mount_point
register_fd = _rings.register_fd
deregister_fd = _rings.deregister_fd
iovec = _rings.iovec
ioring = _rings.ioring

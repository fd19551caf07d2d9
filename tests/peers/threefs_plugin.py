"""A plugin of pytest: fastsafetensor_3fs_reader is this package's, and the emulator is this machine's 3FS."""

from engine_loader import threefs

threefs.install()

"""The native reader threads: the C++ library in src/, bound by ctypes."""

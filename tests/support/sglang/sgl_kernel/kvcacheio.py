"""Imported at module level by SGLang up to 0.5.11; nothing of it is called on a CPU."""

from sgl_kernel import __getattr__  # noqa: F401

"""Which suites there are, and which of their tests differ on purpose."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """A suite of a source distribution.

    Attributes:
        distribution: its name in the registry.
        version: the one that the drop-ins are compared with.
        tests: the files, or directories, of tests within it.
        plugin: puts this package in its place.
        on_purpose: part of a test's name -> why it differs.
    """

    distribution: str
    version: str
    tests: tuple[str, ...]
    plugin: str
    on_purpose: Mapping[str, str] = field(default_factory=dict)


_NUMPY = "safe_open hands out torch's tensors only (framework pt)"
_WORDS = "errors are CheckpointErrors (a missing file a FileNotFoundError as well), in words of their own"

SUITES = (
    Suite(
        "fastsafetensor-3fs-reader",
        "0.3.3",
        ("tests/test_mock.py", "tests/test_threefs.py", "tests/test_lib_preload.py"),
        "tests.peers.threefs_plugin",
    ),
    Suite(
        "safetensors",
        "0.8.0",
        (
            "bindings/python/tests/test_handle.py",
            "bindings/python/tests/test_multithreaded.py",
            "bindings/python/tests/test_pread_backend.py",
            "bindings/python/tests/test_pt_comparison.py",
            "bindings/python/tests/test_pt_model.py",
            "bindings/python/tests/test_simple.py",
            "bindings/python/tests/test_threadable.py",
        ),
        "tests.peers.safetensors_plugin",
        {
            "test_numpy_framework": _NUMPY,
            "TestCase.test_deserialization_metadata": _NUMPY,
            "ReadmeTestCase.test_numpy": _NUMPY,
            "test_serialize_file_releases_gil": _NUMPY,
            "test_get_correctly_dropped": _WORDS,
            "test_file_not_found": _WORDS,
        },
    ),
)

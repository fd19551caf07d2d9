"""A library that a killed linker left unfinished stays on its machine."""

import _ctypes
from pathlib import Path

import pytest

from tests.compile_cache.support import Machine

LIBRARY = Path(_ctypes.__file__).read_bytes()


@pytest.mark.parametrize("kept", [0, 3, 63, 64, len(LIBRARY) // 2, len(LIBRARY) - 1])
def test_it_is_not_saved_and_named(tmp_path: Path, kept: int) -> None:
    first, second = (Machine(tmp_path / name, tmp_path / "store") for name in ("first", "second"))
    first.write("inductor/ab/whole.so", LIBRARY)
    cut = first.write("inductor/cd/cut.so", LIBRARY[:kept])
    outcome = first.save()
    assert outcome.messages == [
        f"{cut} is cut short, as a linker leaves it that was killed: it is not saved; delete it"
    ]
    assert second.restore().status == "restored"
    assert second.content() == {"inductor/ab/whole.so": LIBRARY}


def test_it_is_saved_when_it_has_been_made_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "first", tmp_path / "store")
    machine.write("triton/KEY/kernel.cubin", LIBRARY[:1000])
    assert machine.save().status == "nothing"
    machine.write("triton/KEY/kernel.cubin", LIBRARY)
    outcome = machine.save()
    assert (outcome.status, outcome.messages) == ("saved", [])


def test_what_is_no_library_is_saved_as_it_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "first", tmp_path / "store")
    machine.write("inductor/ab/of-another-machine.so", b"\x7fELF\x01\x01" + bytes(10))
    machine.write("inductor/ab/text.py", b"")
    outcome = machine.save()
    assert (outcome.status, outcome.files, outcome.messages) == ("saved", 2, [])

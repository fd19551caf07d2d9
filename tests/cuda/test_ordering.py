"""The order of reads, copies and their ends on the way to a device, over a stand-in for the CUDA runtime.

The scenarios are in driver.cpp. Each rule is also taken out of the library once (a mutant): its scenario must see that.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.sanitizers import run_sanitized

from .building import HERE, Drivers, Mutant, found_by

pytestmark = pytest.mark.sanitizers
SCENARIOS = re.findall(r"SCENARIO\((\w{5,})\)", (HERE / "driver.cpp").read_text())

# A rule that is broken shows when threads meet in a certain way, which on a busy machine they do not every time.
_TRIES = 20
MUTANTS = [
    Mutant(
        "a_slot_is_used_again_at_once",
        "slots_are_used_again_when_their_copies_have_landed",
        "reader_device",
        {
            "        ring_.give(slot);\n": "        (void)slot;\n",
            "        landing_.launched();\n": "        landing_.launched();\n"
            "        { Lock lock(reader_.transfer.readers.mutex); ring_.give(*slot_); }\n",
        },
    ),
    Mutant(
        "runs_in_a_slot_lie_over_each_other",
        "runs_share_a_slot",
        "reader_device",
        {"        used_ += (room": "        used_ += 0 * (room"},
    ),
    Mutant(
        "copies_do_not_wait_for_the_owner",
        "copies_come_after_the_owners_work",
        "device_ring",
        {"runtime_->StreamWaitEvent(streams_[stream], transfer.ready.get(), 0)": "(void(transfer), void(stream), 0)"},
    ),
    Mutant(
        "one_stream_waits_for_the_owner",
        "copies_come_after_the_owners_work",
        "device_ring",
        {"runtime_->StreamWaitEvent(streams_[stream], ": "runtime_->StreamWaitEvent(streams_[stream * 0], "},
    ),
    Mutant(
        "another_stream_is_taken_for_the_owners",
        "copies_come_after_the_owners_work",
        "device_ring",
        {"EventRecord(transfer.ready.get(), owner)": "EventRecord(transfer.ready.get(), owner ? owner : streams_[0])"},
    ),
    Mutant(
        "a_copy_that_began_counts_as_landed",
        "an_extent_is_complete_when_its_copies_have_landed",
        "device_ring",
        {"runtime_->EventQuery(flight.slot->event.get());": "(void(flight), 0);"},
    ),
    Mutant(
        "no_event_is_recorded_behind_a_copy",
        "slots_are_used_again_when_their_copies_have_landed",
        "device_ring",
        {"runtime_->EventRecord(flight.slot->event.get(), streams_[flight.stream])": "0"},
    ),
    Mutant(
        "a_copy_that_failed_counts_as_landed",
        "a_copy_that_fails_late_is_reported",
        "device_ring",
        {
            "        if (state != 0) fail_with(*flight.transfer, flight.position, state);\n": "",
            "landed(*flight.slot, state == 0, lock)": "landed(*flight.slot, true, lock)",
        },
    ),
    Mutant(
        "a_slot_without_an_event_is_used_again_at_once",
        "a_copy_that_cannot_begin_is_reported",
        "device_ring",
        {"    if (error != 0) checked(*runtime_, runtime_->StreamSynchronize(streams_[flight.stream]));\n": ""},
    ),
    Mutant(
        "a_cancel_does_not_wait_for_copies",
        "a_cancel_waits_for_copies",
        "device_ring",
        {"if (state == kDeviceNotReady) {": "if (state == kDeviceNotReady && !flight.transfer->stop.load()) {"},
    ),
    Mutant(
        "a_close_does_not_wait_for_copies",
        "a_close_waits_for_copies",
        "device_ring",
        {"while (flying_ > 0 || !readers_.closing": "while (!readers_.closing"},
    ),
    Mutant(
        "nobody_looks_at_the_clock",
        "a_device_that_hangs_is_reported",
        "device_ring",
        {"    fail_late(*flight.transfer, flight.position);\n": ""},
    ),
    Mutant(
        "rows_are_put_where_they_lay_in_the_file",
        "strided_destinations_are_filled_by_copies_in_two_dimensions",
        "device_ring",
        {"Memcpy2DAsync(to, segment[1].address - segment->address,": "Memcpy2DAsync(to, segment[1].at - segment->at,"},
    ),
]


def drivers_of(sanitizers: str, pytestconfig: pytest.Config, folder: Path) -> Drivers:
    assert pytestconfig.cache is not None
    return Drivers(pytestconfig.cache.mkdir("native"), folder, sanitizers)


@pytest.fixture(scope="module")
def drivers(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Drivers:
    return drivers_of("address,undefined", pytestconfig, tmp_path_factory.mktemp("drivers"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_rules_are_kept(scenario: str, drivers: Drivers, tmp_path: Path) -> None:
    done = run_sanitized([str(drivers.make()), str(drivers.standin), str(tmp_path), scenario], drivers.sanitizers)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


def test_a_thousand_random_rounds_with_faults_keep_them_and_leave_nothing(drivers: Drivers, tmp_path: Path) -> None:
    command = [str(drivers.make()), str(drivers.standin), str(tmp_path), "random", "1000", "1"]
    done = run_sanitized(command, drivers.sanitizers)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


def test_threads_do_not_race(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    drivers = drivers_of("thread", pytestconfig, tmp_path)
    command = [str(drivers.make()), str(drivers.standin), str(tmp_path), "random", "25", "2"]
    done = run_sanitized(command, drivers.sanitizers)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_rule_that_is_taken_out_is_missed(mutant: Mutant, drivers: Drivers, tmp_path: Path) -> None:
    assert mutant.caught_by in SCENARIOS
    command = [str(drivers.make(mutant)), str(drivers.standin), str(tmp_path), mutant.caught_by]
    said = found_by(lambda _: run_sanitized(command, drivers.sanitizers, timeout_s=10), _TRIES)
    assert "not so:" in said, said

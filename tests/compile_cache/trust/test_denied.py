"""Packs that are well signed and not taken all the same: on the deny-list, or too old."""

import json
import shutil
import time
from pathlib import Path

import pytest

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.stores.interface import Small
from engine_loader.compile_cache.stores.marker import adopt
from engine_loader.compile_cache.stores.object_names import MARKER
from engine_loader.compile_cache.trust import Trust
from engine_loader.compile_cache.trust.denied import NAME, DenyList
from engine_loader.compile_cache.trust.keys import new_key, parse_keys
from engine_loader.compile_cache.trust.signatures import HmacKey, Key
from engine_loader.compile_cache.upkeep.denying import names_of
from engine_loader.compile_cache.upkeep.resign import resign
from tests.compile_cache.support import Machine

DIGEST = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def deny(machine: Machine, denied: DenyList) -> None:
    machine.trust.publish_denied(machine.store, denied, None)


def digest_of(machine: Machine) -> str:
    (pack,) = machine.packs()
    return pack.name.partition(".")[0]


def lose_list(machine: Machine) -> None:
    """As somebody does who can write to the store."""
    (machine.store.directory / NAME).unlink()
    machine.store.announce_denied()  # without a copy


def seen_by(machine: Machine, state: Path | None) -> Trust:
    return machine.trust.with_denied(machine.store, state)


def test_a_denied_pack_is_not_restored_and_the_message_says_why(first: Machine, second: Machine) -> None:
    first.save()
    deny(first, DenyList().with_denied({digest_of(first): "SIGILL\x1b[31m\non old nodes"}))
    second.trust = seen_by(second, None)
    outcome = second.restore()
    assert (outcome.status, second.content()) == ("refused", {})
    assert "it is on the deny-list (SIGILL [31m on old nodes)" in outcome.messages[0]
    assert "compile-cache clear" in outcome.messages[0]


def test_other_packs_of_the_key_are_restored(first: Machine, second: Machine) -> None:
    first.save()
    bad = digest_of(first)
    first.write("inductor/good", b"good code")
    first.save()
    deny(first, DenyList().with_denied({bad: "bad"}))
    second.trust = seen_by(second, None)
    assert second.restore().status == "restored"
    assert second.content() == {"inductor/good": b"good code"}


def test_no_new_pack_gets_the_name_of_a_denied_one() -> None:
    trust = Trust(b"a secret of some length", denied=DenyList(1, {DIGEST: "bad"}))
    with pytest.raises(CacheValidationError, match="on the deny-list"):
        trust.check_pack([DIGEST], time.time(), "the new pack")
    trust.check_pack([OTHER], time.time(), "the new pack")


def test_a_pack_is_taken_again_when_it_is_removed_from_the_list(first: Machine, second: Machine) -> None:
    first.save()
    denied = DenyList().with_denied({digest_of(first): "a mistake"})
    deny(first, denied)
    deny(first, denied.without({digest_of(first)}))
    second.trust = seen_by(second, None)
    assert second.restore().status == "restored"


def test_equal_content_does_not_come_back_under_another_name(first: Machine) -> None:
    """The pack that crashed engines had been signed again, so that its name is not the first of its content."""
    first.save()
    new = HmacKey(b"a new secret of some length")
    first.trust = Trust([new, *first.trust.keys])
    assert [one.problem for one in resign(first.store, first.trust)] == [None]
    names = names_of(first.store, first.trust, {digest_of(first)})
    assert len(names) == 2
    deny(first, DenyList().with_denied(dict.fromkeys(names, "SIGILL")))
    first.packs()[0].unlink()
    first.trust = seen_by(first, None)
    with pytest.raises(CacheValidationError, match="on the deny-list"):
        first.save()
    assert first.packs() == []


class TestWhoMayDeny:
    @pytest.mark.parametrize("forger", [Trust(), Trust(b"the secret of somebody else")])
    def test_a_list_that_is_not_signed_by_a_key_of_this_node_is_passed_over(
        self, forger: Trust, first: Machine, second: Machine
    ) -> None:
        """Else who can write to the store could keep every node from its caches."""
        first.save()
        forger.publish_denied(first.store, DenyList(9, {digest_of(first): "forged"}), None)
        second.trust = seen_by(second, None)
        assert "the deny-list is passed over" in second.trust.warnings[0]
        assert NAME in second.trust.warnings[0]
        assert second.restore().status == "restored"

    def test_a_node_with_public_keys_only_reads_it_and_cannot_write_it(self, tmp_path: Path, store: Path) -> None:
        line = new_key("ed25519")
        signing, public = parse_keys([line.encode()], ""), public_of(line)
        saver = Machine(tmp_path / "a", store, Trust(signing))
        deny(saver, DenyList().with_denied({DIGEST: "bad"}))
        server = Machine(tmp_path / "b", store, Trust(public))
        assert seen_by(server, None).denied.packs == {DIGEST: "bad"}
        with pytest.raises(CacheValidationError, match="public keys only"):
            deny(server, DenyList())

    def test_a_list_of_another_store_does_not_count(self, first: Machine) -> None:
        deny(first, DenyList(3, {DIGEST: "bad"}))
        other = Machine(first.directories["inductor"].parent, first.store.directory, first.trust, "other")
        assert seen_by(other, None).denied == DenyList()

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b"[" * 100_000, b'{"list": 1, "signature": "!"}', b'{"list": "{}"}', bytes(5 << 20)],
    )
    def test_junk_in_its_place_is_told_and_passed_over(self, content: bytes, first: Machine) -> None:
        first.store.announce_denied()
        first.store.replace(NAME, content)
        trust = seen_by(first, None)
        assert trust.denied == DenyList()
        assert len(trust.warnings) == 1


class TestAListThatIsPutBack:
    def test_an_older_list_undoes_nothing_on_a_node_that_has_seen_a_newer(self, first: Machine, state: Path) -> None:
        old = DenyList().with_denied({OTHER: "bad"})
        deny(first, old)
        before = {name: (first.store.directory / name).read_bytes() for name in (NAME, MARKER)}
        deny(first, old.with_denied({DIGEST: "worse"}))
        assert set(seen_by(first, state).denied.packs) == {DIGEST, OTHER}
        for name, content in before.items():
            (first.store.directory / name).write_bytes(content)
        first = Machine(first.directories["inductor"].parent, first.store.directory, first.trust)
        trust = seen_by(first, state)
        assert set(trust.denied.packs) == {DIGEST, OTHER}
        assert "is number 1, and this node has seen number 2" in trust.warnings[0]
        assert "deny --renew" in trust.warnings[0]

    def test_a_list_that_was_deleted_still_counts(self, first: Machine, state: Path) -> None:
        deny(first, DenyList().with_denied({DIGEST: "bad"}))
        seen_by(first, state)
        lose_list(first)
        trust = seen_by(first, state)
        assert trust.denied.packs == {DIGEST: "bad"}
        assert "is missing" in trust.warnings[0]

    def test_writing_it_again_from_the_note_ends_the_warning(self, first: Machine, state: Path) -> None:
        deny(first, DenyList().with_denied({DIGEST: "bad"}))
        trust = seen_by(first, state)
        lose_list(first)
        trust = seen_by(first, state)
        trust.publish_denied(first.store, trust.denied.with_denied({}), state)
        again = seen_by(first, state)
        assert (again.denied.packs, again.warnings) == ({DIGEST: "bad"}, ())

    def test_the_notes_of_two_stores_are_two(self, first: Machine, tmp_path: Path, state: Path) -> None:
        deny(first, DenyList(5, {DIGEST: "bad"}))
        seen_by(first, state)
        other = Machine(tmp_path / "other", tmp_path / "other store", first.trust, "other")
        other_trust = seen_by(other, state)
        assert (other_trust.denied, other_trust.warnings) == (DenyList(), ())

    def test_two_lists_with_one_number_both_count(self, first: Machine, state: Path) -> None:
        """Two people have denied a pack each at the same time, and the later write replaced the earlier."""
        deny(first, DenyList(1, {DIGEST: "bad"}))
        seen_by(first, state)
        deny(first, DenyList(1, {OTHER: "bad"}))
        assert set(seen_by(first, state).denied.packs) == {DIGEST, OTHER}

    def test_a_node_that_cannot_note_it_uses_the_stores(self, first: Machine, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        deny(first, DenyList().with_denied({DIGEST: "bad"}))
        assert seen_by(first, tmp_path / "file" / "state").denied.packs == {DIGEST: "bad"}


class TestWhatItCosts:
    def test_a_store_that_never_had_a_list_is_not_asked_for_one(
        self, first: Machine, second: Machine, state: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first.save()
        read: list[str] = []
        plain = FilesystemStore.read

        def noting(self: FilesystemStore, name: str, most_bytes: int) -> Small:
            read.append(name)
            return plain(self, name, most_bytes)

        monkeypatch.setattr(FilesystemStore, "read", noting)
        seen_by(second, state)
        assert read == ["engine-loader-store.json"]

    def test_a_short_list_comes_with_the_marker(
        self, first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deny(first, DenyList().with_denied({DIGEST: "bad"}))
        read: list[str] = []
        plain = FilesystemStore.read
        monkeypatch.setattr(
            FilesystemStore, "read", lambda self, name, most: read.append(name) or plain(self, name, most)
        )
        assert seen_by(second, None).denied.packs == {DIGEST: "bad"}
        assert read == [MARKER]

    def test_a_long_list_is_an_object_of_its_own(self, first: Machine, second: Machine) -> None:
        packs = {f"{number:064x}": "x" * 400 for number in range(500)}
        deny(first, DenyList().with_denied(packs))
        assert (first.store.directory / MARKER).stat().st_size < 1000
        assert seen_by(second, None).denied.packs == packs

    def test_a_marker_that_was_deleted_and_made_anew_says_that_there_is_one(self, first: Machine) -> None:
        deny(first, DenyList().with_denied({DIGEST: "bad"}))
        (first.store.directory / "engine-loader-store.json").unlink()
        name = first.store.name
        adopt(FilesystemStore(first.store.directory, first.trust), name)
        again = FilesystemStore(first.store.directory, first.trust)
        assert first.trust.with_denied(again, None).denied.packs == {DIGEST: "bad"}


class TestAge:
    def test_an_old_pack_is_refused_and_a_newer_is_not(self, first: Machine, second: Machine) -> None:
        first.save()
        second.trust = Trust(second.trust.keys, most_age_days=7)
        assert second.restore().status == "restored"
        shutil.rmtree(second.directories["inductor"])
        second.trust = Trust(second.trust.keys, most_age_days=1e-9)
        outcome = second.restore()
        assert outcome.status == "refused"
        assert "compile_cache.max_pack_age_days is 1e-09" in outcome.messages[0]

    def test_it_counts_by_the_stores_clock_where_that_is_given(self) -> None:
        trust = Trust(most_age_days=7)
        trust.check_pack([DIGEST], 1e9, "a/pack", now=1e9 + 6 * 86400)
        with pytest.raises(CacheValidationError, match="made 8 days ago"):
            trust.check_pack([DIGEST], 1e9, "a/pack", now=1e9 + 8 * 86400)


def test_the_list_is_plain_json_for_people(first: Machine) -> None:
    deny(first, DenyList().with_denied({DIGEST: "bad"}))
    value = json.loads((first.store.directory / NAME).read_bytes())
    assert json.loads(value["list"]) == {"counter": 1, "packs": {DIGEST: "bad"}}


@pytest.mark.parametrize("name", ["", "abc", "../etc", "AB" * 32, f"{DIGEST}.tar.zst"])
def test_what_is_no_digest_cannot_be_denied(name: str) -> None:
    with pytest.raises(CacheValidationError, match="names no pack"):
        DenyList().with_denied({name: ""})


def public_of(line: str) -> tuple[Key, ...]:
    from engine_loader.compile_cache.trust.keys import public_line

    (key,) = parse_keys([line.encode()], "")
    return parse_keys([str(public_line(key)).encode()], "")

"""Keys and key files: what signs, what verifies, and what is refused."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.trust import Trust, load_trust, places
from engine_loader.compile_cache.trust.keys import new_key, parse_keys, public_line
from engine_loader.compile_cache.trust.signatures import MOST_BLOCK_BYTES, Key
from engine_loader.compile_cache.upkeep.resign import resign
from engine_loader.compile_cache.upkeep.suspects import note_suspects
from engine_loader.settings import load_settings
from tests.compile_cache.support import KEY, Machine

CONTENT = b"a manifest"


def key_of(line: str) -> Key:
    (key,) = parse_keys([line.encode()], "test")
    return key


@pytest.fixture
def hmac() -> Key:
    return key_of(new_key("hmac"))


@pytest.fixture
def signing() -> Key:
    return key_of(new_key("ed25519"))


@pytest.fixture
def public(signing: Key) -> Key:
    line = public_line(signing)
    assert line is not None
    return key_of(line)


def key_file(path: Path, *lines: str, mode: int = 0o600) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(mode)
    return str(path)


def refusal(trust: Trust, block: bytes, content: bytes = CONTENT) -> str:
    with pytest.raises(CacheValidationError) as raised:
        trust.verify(content, block, "a/pack")
    assert str(raised.value).startswith("a/pack: refused: ")
    return str(raised.value)


class TestSignatures:
    @pytest.mark.parametrize("kind", ["plain", "hmac", "ed25519"])
    def test_every_changed_byte_of_content_and_block_is_refused(self, kind: str, hmac: Key, signing: Key) -> None:
        keys: dict[str, tuple[Key, ...]] = {"plain": (), "hmac": (hmac,), "ed25519": (signing,)}
        trust = Trust(keys[kind])
        block = trust.sign(CONTENT)
        trust.verify(CONTENT, block, "a/pack")
        assert len(block) <= MOST_BLOCK_BYTES
        for position in range(len(block)):
            refusal(trust, block[:position] + bytes([block[position] ^ 1]) + block[position + 1 :])
        for cut in (b"", block[:5], block[:-1], block + b"x", block + bytes(200)):
            refusal(trust, cut)
        refusal(trust, block, CONTENT + b".")

    def test_what_a_signing_key_signs_its_public_key_verifies(self, signing: Key, public: Key) -> None:
        assert signing.id == public.id
        Trust([public]).verify(CONTENT, Trust([signing]).sign(CONTENT), "a/pack")

    def test_a_public_key_cannot_sign(self, public: Key) -> None:
        assert not Trust([public]).can_sign
        with pytest.raises(CacheValidationError, match=r"public keys only.*compile_cache\.read_only: true"):
            Trust([public]).sign(CONTENT)

    def test_a_public_key_is_no_hmac_secret(self, public: Key) -> None:
        """Who knows the public key, as everybody may, cannot use it as a secret that its nodes accept."""
        line = public_line(public)
        assert line is not None
        forged = Trust(line.encode()).sign(CONTENT)
        assert "forged" in refusal(Trust([public]), forged)

    def test_the_message_names_both_keys(self, hmac: Key, signing: Key) -> None:
        told = refusal(Trust([hmac]), Trust([signing]).sign(CONTENT))
        assert f"Ed25519 is by the key {signing.id.hex()}, and this node knows {hmac.id.hex()}" in told

    def test_one_signs_and_all_verify(self, hmac: Key, signing: Key, public: Key) -> None:
        both = Trust([public, hmac, signing])
        assert both.is_by_signer(both.sign(CONTENT))
        Trust([hmac]).verify(CONTENT, both.sign(CONTENT), "a/pack")
        both.verify(CONTENT, Trust([signing]).sign(CONTENT), "a/pack")
        assert not both.is_by_signer(Trust([signing]).sign(CONTENT))

    def test_another_purpose_is_another_signature(self, hmac: Key) -> None:
        trust = Trust([hmac])
        with pytest.raises(CacheValidationError, match="HMAC is wrong"):
            trust.verify(CONTENT, trust.sign(CONTENT, purpose="deny-list"), "a/pack")

    def test_secrets_are_not_in_a_repr(self, hmac: Key, signing: Key) -> None:
        assert "secret" not in repr(hmac)
        assert "seed" not in repr(signing)


class TestNamesOfStores:
    @pytest.mark.parametrize("kind", ["plain", "hmac", "ed25519"])
    def test_a_pack_of_staging_is_none_of_productions(self, kind: str, hmac: Key, signing: Key) -> None:
        keys: dict[str, tuple[Key, ...]] = {"plain": (), "hmac": (hmac,), "ed25519": (signing,)}
        trust = Trust(keys[kind])
        block = trust.sign(CONTENT, store="staging")
        trust.verify(CONTENT, block, "a/pack", store="staging")
        with pytest.raises(CacheValidationError, match="made for another store"):
            trust.verify(CONTENT, block, "a/pack", store="production")

    def test_a_pack_that_was_copied_from_there_is_not_restored(self, tmp_path: Path, hmac: Key) -> None:
        staging = Machine(tmp_path / "a", tmp_path / "staging", Trust([hmac]), "staging")
        production = Machine(tmp_path / "b", tmp_path / "production", Trust([hmac]), "production")
        staging.write("inductor/a", b"of staging")
        staging.save()
        (pack,) = staging.packs()
        production.store.found()
        target = production.store.directory / KEY.prefix
        target.mkdir(parents=True)
        (target / pack.name).write_bytes(pack.read_bytes())
        outcome = production.restore()
        assert (outcome.status, production.content()) == ("refused", {})
        assert "made for another store" in outcome.messages[0]


class TestNodesWithPublicKeysOnly:
    def test_they_restore_and_do_not_save(self, tmp_path: Path, store: Path, signing: Key, public: Key) -> None:
        saver = Machine(tmp_path / "first", store, Trust([signing]))
        saver.write("inductor/a", b"code")
        assert saver.save().status == "saved"
        server = Machine(tmp_path / "second", store, Trust([public]))
        assert server.restore().status == "restored"
        assert server.content() == {"inductor/a": b"code"}
        server.write("inductor/b", b"more")
        with pytest.raises(CacheValidationError, match="public keys only"):
            server.save()
        assert len(saver.packs()) == 1


class TestRotation:
    def test_no_node_misses_at_any_step(self, tmp_path: Path, store: Path) -> None:
        """Nodes take each step at different times: all four pairs of neighbouring steps restore each other's packs."""
        old, new = key_of(new_key("hmac")), key_of(new_key("ed25519"))
        steps = [[old], [old, new], [new, old], [new]]
        for saver, reader in [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]:
            place = tmp_path / f"{saver}{reader}"
            first = Machine(place / "a", place / "store", Trust(steps[saver]))
            first.write("inductor/a", b"code")
            first.save()
            second = Machine(place / "b", place / "store", Trust(steps[reader]))
            assert second.restore().status == "restored", (saver, reader)

    def test_packs_of_the_old_key_are_signed_again(self, tmp_path: Path, store: Path) -> None:
        old, new = key_of(new_key("hmac")), key_of(new_key("hmac"))
        first = Machine(tmp_path / "first", store, Trust([old]))
        first.write("inductor/a", b"code")
        first.save()
        first.trust = Trust([new, old])
        first.write("inductor/b", b"more code")
        first.save()
        done = list(resign(first.store, first.trust))
        assert [one.problem for one in done] == [None]  # the second was signed by the new key
        assert list(resign(first.store, first.trust)) == []
        second = Machine(tmp_path / "second", store, Trust([new]))
        outcome = second.restore()
        assert (outcome.status, outcome.files, outcome.messages) == ("restored", 2, [])
        assert second.content() == first.content()

    def test_signing_again_that_ended_half_way_loses_nothing(
        self, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = key_of(new_key("hmac")), key_of(new_key("hmac"))
        first = Machine(tmp_path / "first", store, Trust([old]))
        first.write("inductor/a", b"code")
        first.save()
        (before,) = first.packs()
        note_suspects(first.store, [f"{KEY.prefix}/{before.name}"])
        with monkeypatch.context() as patch:
            patch.setattr(FilesystemStore, "delete", lambda _self, name: os._exit(1) if "tar" in name else None)
            pid = os.fork()
            if not pid:
                list(resign(first.store, Trust([new, old])))
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert len(first.packs()) == 2
        assert Machine(tmp_path / "second", store, Trust([new])).restore().status == "restored"
        assert [one.problem for one in resign(first.store, Trust([new, old]))] == [None]
        (after,) = first.packs()
        assert after.name != before.name
        third = Machine(tmp_path / "third", store, Trust([new]))
        assert third.restore().messages == []
        assert third.content() == first.content()
        suspected = [entry.digest for entry in first.store.entries(KEY.prefix) if entry.kind == "suspect"]
        assert suspected == [after.name.partition(".")[0]]

    def test_what_does_not_verify_is_not_signed_again(self, tmp_path: Path, store: Path) -> None:
        thief, mine = Trust(b"the secret of somebody else"), Trust(b"a secret of this fleet")
        first = Machine(tmp_path / "first", store, thief)
        first.write("inductor/a", b"bad code")
        first.save()
        (done,) = resign(first.store, mine)
        assert "HMAC" in str(done.problem)
        assert Machine(tmp_path / "second", store, mine).restore().status == "refused"


class TestKeyFiles:
    def test_a_key_a_line_and_comments(self, tmp_path: Path) -> None:
        lines = [new_key("hmac"), new_key("ed25519"), "a secret of some length"]
        found = load_trust(key_file(tmp_path / "keys", "# fleet 7", lines[0], "", lines[1], f"  {lines[2]} "))
        assert found.keys == tuple(map(key_of, lines))
        assert found.warnings == ()

    def test_public_keys_of_the_settings_verify_beside_it(self, tmp_path: Path, hmac: Key, public: Key) -> None:
        line = str(public_line(public))
        assert load_trust(None, f"{line}, {line}").keys == (public, public)
        file = key_file(tmp_path / "key", "a secret of some length")
        assert load_trust(file, line).keys == (key_of("a secret of some length"), public)

    @pytest.mark.parametrize("form", ["[{0}, {0}]", "\n    - {0}\n    - {0}", "{0} {0}"])
    def test_public_keys_are_a_list_in_the_file_of_settings(self, form: str, tmp_path: Path, public: Key) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text(f"compile_cache:\n  public_keys: {form.format(public_line(public))}\n")
        settings = load_settings(environ={"ENGINE_LOADER_CONFIG": str(file)}).settings.compile_cache
        assert load_trust(None, settings.public_keys).keys == (public, public)

    @pytest.mark.parametrize("make", [lambda: new_key("ed25519"), lambda: new_key("hmac")])
    def test_a_secret_among_public_keys_is_refused_and_not_shown(self, make: object) -> None:
        assert callable(make)
        secret = make()
        with pytest.raises(CacheValidationError, match=r"secrets belong into compile_cache\.key_file") as raised:
            load_trust(None, secret)
        assert secret not in str(raised.value)

    @pytest.mark.parametrize("line", ["ed25519-public:AAAA", "ed25519-private:not base64!", "ed25519-private:"])
    def test_a_key_that_is_cut_short_is_named_by_its_line(self, line: str, tmp_path: Path) -> None:
        with pytest.raises(CacheValidationError, match="line 2: this is not an Ed25519 key") as raised:
            load_trust(key_file(tmp_path / "key", "a secret of some length", line))
        assert "not base64!" not in str(raised.value)

    def test_without_cryptography_the_message_says_how_to_install_it(self, tmp_path: Path) -> None:
        path = key_file(tmp_path / "key", new_key("ed25519"))
        code = (
            "import sys; sys.modules['cryptography'] = None\n"
            "from engine_loader.compile_cache.trust import load_trust\n"
            "load_trust(sys.argv[1])"
        )
        ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
        assert "pip install 'engine-loader[signing]'" in ran.stderr

    def test_cryptography_is_not_imported_for_a_secret(self, tmp_path: Path) -> None:
        path = key_file(tmp_path / "key", new_key("hmac"))
        code = (
            "import sys\nfrom engine_loader.compile_cache.trust import load_trust\n"
            "load_trust(sys.argv[1]).sign(b'')\nprint('cryptography' in sys.modules)"
        )
        ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == "False"


class TestWhoCanReadOrReplaceAKeyFile:
    def test_one_that_others_may_read_is_warned_about(self, open_directory: Path) -> None:
        file = key_file(open_directory / "key", "a secret of some length", mode=0o644)
        (warning,) = load_trust(file).warnings
        assert f"{file}: others may read it (mode 644)" in warning
        assert "defaultMode: 0400" in warning

    def test_a_file_of_public_keys_may_be_read(self, open_directory: Path, public: Key) -> None:
        file = key_file(open_directory / "key", str(public_line(public)), mode=0o644)
        assert load_trust(file).warnings == ()

    def test_one_in_a_directory_that_others_cannot_enter_is_not_warned_about(self, open_directory: Path) -> None:
        open_directory.chmod(0o700)
        assert load_trust(key_file(open_directory / "key", "a secret of some length", mode=0o644)).warnings == ()

    def test_one_in_a_directory_that_others_may_write_is_refused(self, open_directory: Path) -> None:
        file = key_file(open_directory / "key", "a secret of some length")
        open_directory.chmod(0o777)
        with pytest.raises(
            CacheValidationError, match=f"{open_directory} above it, so others could put their own keys"
        ):
            load_trust(file)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root has directories like those of Kubernetes")
    def test_a_secret_as_kubernetes_mounts_it_is_taken_with_a_warning(self, open_directory: Path) -> None:
        volume = open_directory
        (volume / "..2026").mkdir()
        (volume / "..2026").chmod(0o755)
        key_file(volume / "..2026" / "key", "a secret of some length", mode=0o644)
        (volume / "..data").symlink_to("..2026")
        (volume / "key").symlink_to("..data/key")
        volume.chmod(0o1777)
        trust = load_trust(str(volume / "key"))
        assert trust.keys == (key_of("a secret of some length"),)
        assert len(trust.warnings) == 1
        (volume / "..2026" / "key").chmod(0o440)  # defaultMode: 0400 with fsGroup
        assert load_trust(str(volume / "key")).warnings == ()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
    def test_one_behind_a_link_of_another_user_is_refused(self, tmp_path: Path) -> None:
        key_file(tmp_path / "real", "a secret of some length")
        (tmp_path / "key").symlink_to("real")
        os.lchown(tmp_path / "key", 12345, 12345)
        with pytest.raises(CacheValidationError, match="belongs to user 12345"):
            load_trust(str(tmp_path / "key"))

    def test_one_on_a_mount_that_makes_owners_up_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(places, "made_up_owners", lambda path: "of this mount")
        monkeypatch.setattr("engine_loader.compile_cache.trust.keys.made_up_owners", places.made_up_owners)
        with pytest.raises(CacheValidationError, match="of this mount"):
            load_trust(key_file(tmp_path / "key", "a secret of some length"))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can enter. Not below pytest's own directory, which each run of pytest closes."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)

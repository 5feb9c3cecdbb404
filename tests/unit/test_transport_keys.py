"""CURVE keys in files: file modes, and errors with remedies."""

import stat
from pathlib import Path

import pytest

from sgpo_async.errors import HubError
from sgpo_async.transport import Dealer, Router, create_keys
from sgpo_async.transport.keys import key_pair, public_key


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_can_read_created_secret_keys(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "keys"
    files = create_keys(folder)
    assert sorted(path.name for path in files) == [
        "actor.key",
        "actor.key_secret",
        "learner.key",
        "learner.key_secret",
        "server.key",
        "server.key_secret",
    ]
    assert mode(folder) == 0o700
    assert {mode(path) for path in files if path.suffix == ".key_secret"} == {0o600}
    for name in ("server", "learner", "actor"):
        public, secret = key_pair(folder, name)
        assert public == public_key(folder, name) != secret


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    create_keys(tmp_path)
    before = (tmp_path / "server.key_secret").read_bytes()
    with pytest.raises(
        HubError, match=r"keys: .* exists, and existing keys are never overwritten; choose another folder"
    ):
        create_keys(tmp_path)
    assert (tmp_path / "server.key_secret").read_bytes() == before


def test_an_error_names_the_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match=r"keys: cannot write .*/file/keys \(.*\); choose another folder"):
        create_keys(tmp_path / "file" / "keys")


def test_the_error_about_missing_keys_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"server\.key_secret is missing .* 'sgpo-async keys DIR'"):
        Router("tcp://127.0.0.1:0", keys=tmp_path, max_bytes=1000)
    with pytest.raises(HubError, match=r"actor\.key_secret is missing .* 'sgpo-async keys DIR'"):
        Dealer("tcp://127.0.0.1:1", keys=tmp_path, max_bytes=1000)


def test_a_secret_key_that_other_users_can_access_is_refused(tmp_path: Path) -> None:
    create_keys(tmp_path)
    (tmp_path / "actor.key_secret").chmod(0o644)
    with pytest.raises(HubError, match="other users can access .*; run chmod 600 .*actor.key_secret"):
        key_pair(tmp_path, "actor")


def test_the_error_for_an_invalid_key_file_names_the_file(tmp_path: Path) -> None:
    create_keys(tmp_path)
    (tmp_path / "actor.key").write_text("nonsense")
    with pytest.raises(HubError, match=r"actor\.key is missing or holds no key"):
        public_key(tmp_path, "actor")

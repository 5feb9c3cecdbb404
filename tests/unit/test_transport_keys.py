"""CURVE keys in files: file modes, and errors with remedies."""

import os
import stat
from pathlib import Path

import pytest

from sgpo_async.cli.main import main
from sgpo_async.errors import HubError
from sgpo_async.transport import Dealer, Router, create_keys
from sgpo_async.transport.keys import actor_keys, actor_pair, add_actors, fingerprint, key_pair, public_key, revoke


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


# ---- a key for each node


def test_keys_of_nodes_are_private_and_come_with_those_of_hub_and_learner(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        files = add_actors(tmp_path / "keys", ["n1", "n2.rack-3"])
        files += add_actors(tmp_path / "keys", ["n4"])
    finally:
        os.umask(before)
    names = ("actor-n1", "actor-n2.rack-3", "actor-n4", "learner", "server")
    assert sorted(path.name for path in files) == sorted(
        f"{name}.{kind}" for name in names for kind in ("key", "key_secret")
    )
    assert {mode(path) for path in files if path.suffix == ".key_secret"} == {0o600}
    assert mode(tmp_path / "keys") == 0o700
    assert list(actor_keys(tmp_path / "keys").values()) == ["n1", "n2.rack-3", "n4"]


@pytest.mark.parametrize("name", ["", "../n1", "n/1", "-n", "n 1", "x" * 65])
def test_the_name_of_a_node_must_be_one_of_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(HubError, match=r"keys: the name '.*' must have 1 to 64 letters, digits"):
        add_actors(tmp_path, ["good", name])
    assert list(tmp_path.iterdir()) == []


def test_the_key_of_a_node_is_never_overwritten_and_can_be_revoked(tmp_path: Path) -> None:
    create_keys(tmp_path)
    add_actors(tmp_path, ["n1"])
    with pytest.raises(HubError, match=r"actor-n1.key exists, and existing keys are never overwritten"):
        add_actors(tmp_path, ["n2", "n1"])
    assert list(actor_keys(tmp_path).values()) == ["n1", "actor"]
    revoke(tmp_path, "n1")
    with pytest.raises(HubError, match=r"has no key n1; sgpo-async keys .* --list shows all"):
        revoke(tmp_path, "n1")
    revoke(tmp_path, "actor")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "learner.key",
        "learner.key_secret",
        "server.key",
        "server.key_secret",
    ]
    with pytest.raises(HubError, match=r"actor\.key is missing or holds no key"):
        Router("tcp://127.0.0.1:0", keys=tmp_path, max_bytes=1000)


def test_a_node_takes_its_own_key_else_the_shared_one_else_the_only_one(tmp_path: Path) -> None:
    add_actors(tmp_path, ["n1"])
    n1 = key_pair(tmp_path, "actor-n1")
    assert actor_pair(tmp_path, "another name") == actor_pair(tmp_path, "n1") == n1
    add_actors(tmp_path, ["n2"])
    assert actor_pair(tmp_path, "n1") == n1
    with pytest.raises(HubError, match=r"several nodes \(actor-n1, actor-n2\) and none of n3; keep that of this node"):
        actor_pair(tmp_path, "n3")
    add_actors(tmp_path, ["actor"])
    assert actor_pair(tmp_path, "n1") == n1
    assert actor_pair(tmp_path, "n3") == key_pair(tmp_path, "actor")


def test_the_command_makes_lists_and_revokes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "keys")
    assert main(["keys", folder, "--actor", "n1", "watch"]) == 0
    made = capsys.readouterr().out
    assert "copy to one node  server.key actor-n1.key_secret" in made
    assert main(["keys", folder, "--revoke", "n1"]) == 0
    assert main(["keys", folder, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()[-1].split()
    key = public_key(folder, "actor-watch")
    assert listed == ["watch", fingerprint(key), f"{folder}/actor-watch.key"]
    for secret in (tmp_path / "keys").glob("*.key_secret"):
        assert key_pair(folder, secret.stem)[1].decode() not in made
    assert main(["keys", folder, "--revoke", "n1"]) == 2
    assert "has no key n1" in capsys.readouterr().err
    assert main(["keys", f"{folder}-missing", "--list"]) == 2
    assert f"{folder}-missing is no folder" in capsys.readouterr().err

"""Small parts of a session: settings, network interfaces, error texts, and the imports of its handles."""

import subprocess
import sys

import psutil
import pytest

from sgpo_async.errors import SessionError
from sgpo_async.session.child_side import one_line
from sgpo_async.session.interface import interface_towards
from sgpo_async.session.settings import Deadlines, Settings


def test_decoding_settings_inverts_encoding() -> None:
    settings = Settings("actor-é", 17, store="/a b", host="::1", deadlines=Deadlines(call_s=0.5))
    assert Settings.decode(settings.encode()) == settings


def test_the_interface_towards_a_local_address_has_that_address() -> None:
    addresses = {a.address for a in psutil.net_if_addrs()[interface_towards("127.0.0.1")]}
    assert "127.0.0.1" in addresses
    assert interface_towards("localhost") == interface_towards("127.0.0.1")


def test_the_error_for_an_unknown_host_names_it() -> None:
    with pytest.raises(SessionError, match=r"session host no-such-host\.invalid"):
        interface_towards("no-such-host.invalid")


def test_one_line_joins_lines_and_limits_the_length() -> None:
    assert one_line("a\n  b\n") == "a b"
    assert len(one_line("x" * 10_000)) == 500


def test_importing_the_handles_does_not_import_torch() -> None:
    code = (
        "import sys, sgpo_async.weights, sgpo_async.session.sender, sgpo_async.session.receiver;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=240, check=False).returncode == 0

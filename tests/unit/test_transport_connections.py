"""Whose connections have ended, when messages are read after the end and descriptors are used again."""

import pytest

from sgpo_async.transport.router import Connections


@pytest.fixture
def connections() -> Connections:
    found = Connections()
    found.begin(9)
    return found


def test_a_member_is_gone_once_with_its_connection(connections: Connections) -> None:
    connections.message(9, b"a")
    assert connections.gone() == []
    connections.end(9)
    assert connections.gone() == [b"a"] and connections.gone() == []


def test_a_member_whose_messages_are_all_read_after_the_end_is_gone(connections: Connections) -> None:
    connections.end(9)
    for _ in range(3):
        connections.message(9, b"a")
    assert connections.gone() == [b"a"] and connections.members == {}


def test_a_member_that_has_returned_is_not_gone(connections: Connections) -> None:
    connections.message(9, b"a")
    connections.end(9)
    connections.begin(9)
    connections.message(9, b"a")
    assert connections.gone() == []
    connections.begin(12)  # beside the old one, as after a power loss
    connections.message(12, b"a")
    connections.end(9)
    assert connections.gone() == []


def test_late_messages_blame_no_other_member_that_has_the_descriptor_now(connections: Connections) -> None:
    connections.end(9)
    connections.begin(9)
    for member in (b"a", b"b", b"a", b"b", b"a"):
        connections.message(9, member)
    assert connections.gone() == [b"a"] and connections.members == {9: b"b"}
    connections.all_read()
    connections.end(9)
    assert connections.gone() == [b"b"]


def test_a_connection_that_begins_without_the_end_of_the_one_before_it_ends_that(connections: Connections) -> None:
    connections.message(9, b"a")
    connections.begin(9)
    assert connections.gone() == [b"a"]


def test_the_rest_of_a_replaced_connection_belongs_to_nobody(connections: Connections) -> None:
    """ZeroMQ gives it an identity of its own."""
    connections.message(9, b"a")
    connections.begin(12)
    connections.message(12, b"a")
    connections.message(9, b"\0 of ZeroMQ")
    connections.end(9)
    connections.message(9, b"\0 of ZeroMQ")
    assert connections.gone() == []

"""Where actors get their weights from: few copies from the hub, no circles, one pull for each machine."""

from __future__ import annotations

import math

import pytest
from hub_support import Driver, make_run
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.hub.actors import FROM_HUB, Actor, Actors, Route
from sgpo_async.hub.core import RETURN_S
from sgpo_async.hub.events import CloseSender, Disconnected, OpenSender, Received, Send, SenderDown, SenderUp, Tick
from sgpo_async.hub.weight_routes import OPEN_S, WeightRoutes
from sgpo_async.wire import records as wire


class Fleet:
    """Actors that join, come back and get lost; the weight senders that they are asked for start at once."""

    def __init__(self, fanout: int = 2, *, shared: bool = True) -> None:
        self.actors = Actors()
        self.routes = WeightRoutes(self.actors, run_id="", fanout=fanout, shared=shared)
        self.fanout = fanout

    def join(self, name: str, *, machine: str = "", serves: bool = True, direct: bool = False) -> Actor:
        hello = wire.Hello(role="actor", name=name, machine=machine, store=machine and f"store {name}", serves=serves)
        if known := self.actors.get(name.encode()):
            self.routes.close(known)
        actor = self.actors.join(name.encode(), hello, now=0.0)
        self.routes.open(actor, now=0.0, direct=direct)
        actor.welcomed = True
        return actor

    def lose(self, name: str) -> None:
        actor = self.actors[name.encode()]
        self.actors.leave(actor.member)
        self.routes.close(actor)
        for other in list(self.actors.values()):  # they notice it and say Hello
            if other.route and other.route.source == actor.member:
                self.join(other.name, machine=other.machine, serves=other.serves)

    def path(self, actor: Actor) -> list[str]:
        """The names of the sources from this actor to the hub."""
        path: list[str] = []
        while actor.route and actor.route.source:
            actor = self.actors[actor.route.source]
            assert actor.name not in path, "a circle"
            path.append(actor.name)
        assert actor.route is not None
        return path

    def served(self, source: str) -> int:
        """How many weight senders a source keeps."""
        routes = [actor.route for actor in self.actors.values() if actor.route]
        return sum(route.source == source.encode() and not route.shared for route in routes)


@pytest.mark.parametrize(("fanout", "nodes"), [(1, 7), (2, 16), (3, 40)])
def test_the_hub_serves_few_and_no_node_is_far(fanout: int, nodes: int) -> None:
    fleet = Fleet(fanout)
    for number in range(nodes):
        fleet.join(f"n{number}")
    assert fleet.served("") == fanout
    assert all(fleet.served(actor.name) <= fanout for actor in fleet.actors.values())
    hops = max(len(fleet.path(actor)) for actor in fleet.actors.values())
    deepest = nodes - 1 if fanout == 1 else math.ceil(math.log(nodes * (fanout - 1) / fanout + 1, fanout)) - 1
    assert hops == deepest


def test_without_a_limit_every_actor_is_served_by_the_hub() -> None:
    fleet = Fleet(0)
    assert all(fleet.join(f"n{number}").route == FROM_HUB for number in range(5))


def test_an_actor_that_cannot_serve_others_is_passed_over() -> None:
    fleet = Fleet(1)
    fleet.join("a", serves=False)
    assert fleet.join("b").route == FROM_HUB, "there is nobody else"
    assert fleet.path(fleet.join("c")) == ["b"]


def test_an_actor_that_another_one_could_not_serve_gets_the_weights_from_the_hub() -> None:
    fleet = Fleet(1)
    fleet.join("a", machine="m")
    assert fleet.path(fleet.join("b")) == ["a"]
    assert fleet.join("b", direct=True).route == FROM_HUB
    assert fleet.join("c", machine="m", direct=True).route == FROM_HUB


def test_actors_of_one_machine_share_a_store() -> None:
    fleet = Fleet(1)
    first, second = fleet.join("a", machine="m"), fleet.join("b", machine="m")
    other, alone = fleet.join("c", machine="n"), fleet.join("d")
    assert (first.route, second.route) == (FROM_HUB, Route(b"a", shared=True))
    assert other.route == Route(b"a", sender=1), "a node that shares another one's store is no source"
    assert alone.route == Route(b"c", sender=2)
    again = fleet.join("a", machine="m")
    assert again.route == FROM_HUB, "the others depend on its store"
    fleet.lose("a")
    assert fleet.actors[b"b"].route == FROM_HUB
    assert fleet.join("a", machine="m").route == Route(b"b", shared=True)


def test_where_the_weight_sender_broadcasts_no_store_is_shared() -> None:
    fleet = Fleet(0, shared=False)
    assert {fleet.join(name, machine="m").route for name in "abc"} == {FROM_HUB}


names = st.sampled_from([f"n{number}" for number in range(9)])
machines = st.sampled_from(["", "", "m", "n"])


@given(st.integers(1, 3), st.lists(st.tuples(st.booleans(), names, machines), max_size=60))
def test_every_route_leads_to_the_hub(fanout: int, steps: list[tuple[bool, str, str]]) -> None:
    fleet = Fleet(fanout)
    for joins, name, machine in steps:
        if joins:
            known = fleet.actors.get(name.encode())
            fleet.join(name, machine=known.machine if known else machine)
        elif name.encode() in fleet.actors:
            fleet.lose(name)
        for actor in fleet.actors.values():
            fleet.path(actor)
            assert fleet.served(actor.name) <= fanout
            if actor.route and actor.route.shared:
                leader = fleet.actors[actor.route.source]
                assert leader.route and not leader.route.shared and leader.machine == actor.machine
        assert fleet.served("") <= fanout, "every node serves, so the hub needs no more"


# ---- the messages


def hello(name: str, **changes: object) -> wire.Hello:
    return wire.Hello(role="actor", name=name, serves=True, **changes)  # type: ignore[arg-type]


def test_an_actor_is_welcomed_when_the_other_ones_weight_sender_is_up() -> None:
    driver = Driver(make_run(weight_fanout=1))
    driver.send(b"a", hello("a"))
    driver.handle(SenderUp(b"a", "10.0.0.1", 4000))
    assert driver.send(b"b", hello("b")) == [Send(b"a", wire.OpenSender(sender=1, name="b"))]
    (sent,) = driver.send(b"a", wire.SenderUp(sender=1, host="10.0.0.2", port=5000, secret=b"s" * 32))
    assert isinstance(sent, Send) and sent.member == b"b"
    welcome = sent.message
    assert isinstance(welcome, wire.Welcome)
    assert (welcome.source, welcome.session_host, welcome.session_port) == ("a", "10.0.0.2", 5000)
    assert welcome.session_secret == b"s" * 32
    statuses = {actor["name"]: actor["source"] for actor in driver.core.status()["actors"]}
    assert statuses == {"a": "", "b": "a"}


def test_an_actor_of_the_same_machine_is_welcomed_at_once() -> None:
    driver = Driver(make_run())
    driver.send(b"a", hello("a", machine="m", store="/proc/1/fd/3"))
    (sent,) = driver.send(b"b", hello("b", machine="m", store="/proc/2/fd/3"))
    assert isinstance(sent, Send) and isinstance(sent.message, wire.Welcome)
    assert (sent.member, sent.message.store, sent.message.source) == (b"b", "/proc/1/fd/3", "a")


def test_a_source_that_is_lost_or_comes_back_is_replaced_for_those_who_wait() -> None:
    driver = Driver(make_run(weight_fanout=1))
    driver.send(b"a", hello("a"))
    driver.handle(SenderUp(b"a", "10.0.0.1", 4000))
    driver.send(b"b", hello("b"))
    effects = driver.send(b"a", hello("a"))
    assert effects[-2:] == [
        Send(b"a", wire.CloseSender(sender=1)),
        Send(b"a", wire.OpenSender(sender=2, name="b")),
    ], "the first order, or its answer, may be lost"
    late = wire.SenderUp(sender=1, host="10.0.0.2", port=5000, secret=b"")
    assert driver.send(b"a", late) == [Send(b"a", wire.CloseSender(sender=1))]
    assert OpenSender(b"b", "b") in driver.send(b"a", wire.Goodbye()), "nobody else is there"
    driver.handle(SenderUp(b"b", "10.0.0.1", 4001))
    assert driver.core.actors[b"b"].welcomed and driver.core.actors[b"b"].route == FROM_HUB


def test_actors_that_start_at_the_same_time_do_not_all_get_their_weights_from_the_hub() -> None:
    driver = Driver(make_run(weight_fanout=1))
    for name in ("a", "b", "c"):
        driver.send(name.encode(), hello(name))
    routes = [driver.core.actors[name].route for name in (b"a", b"b", b"c")]
    assert routes == [FROM_HUB, Route(b"a", sender=1), Route(b"b", sender=2)]


def test_the_end_of_a_session_with_another_actor_is_that_of_one_with_the_hub() -> None:
    driver = Driver(make_run(weight_fanout=1))
    driver.send(b"a", hello("a"))
    driver.handle(SenderUp(b"a", "10.0.0.1", 4000))
    driver.send(b"b", hello("b"))
    driver.send(b"a", wire.SenderUp(sender=1, host="10.0.0.2", port=5000, secret=b""))
    effects = driver.send(b"a", wire.SenderDown(sender=1, reason="peer lost"))
    assert Send(b"b", wire.Refused(reason="the session ended: peer lost")) in effects
    assert Send(b"a", wire.CloseSender(sender=1)) in effects
    again = driver.send(b"b", hello("b", direct=True))
    assert OpenSender(b"b", "b") in again
    assert driver.handle(SenderDown(b"a", "peer lost"))[0] == Send(
        b"a", wire.Refused(reason="the session ended: peer lost")
    )


def test_a_sender_of_the_hub_that_is_no_longer_wanted_is_closed() -> None:
    driver = Driver(make_run(weight_fanout=1))
    for name in ("a", "b"):
        driver.send(name.encode(), hello(name))
        driver.handle(SenderUp(name.encode(), "10.0.0.1", 4000))
    assert driver.handle(SenderUp(b"b", "10.0.0.1", 4001)) == [CloseSender(b"b")], "its source is the other actor"


def test_only_a_member_is_asked_and_heard() -> None:
    driver = Driver(make_run())
    effects = driver.handle(Received(b"x", wire.SenderUp(sender=1, host="h", port=1, secret=b"")))
    assert [type(effect.message) for effect in effects if isinstance(effect, Send)] == [wire.Refused]


def test_actors_that_do_not_notice_the_loss_of_their_source_are_told() -> None:
    """It may hang: then its store, or the weight senders beside it, go on existing, and get no weights any more."""
    driver = Driver(make_run(weight_fanout=1))
    driver.send(b"a", hello("a", machine="m", store="/proc/1/fd/3"))
    driver.handle(SenderUp(b"a", "10.0.0.1", 4000))
    driver.send(b"b", hello("b", machine="m", store="/proc/2/fd/3"))
    driver.send(b"c", hello("c"))
    driver.send(b"a", wire.SenderUp(sender=1, host="10.0.0.2", port=5000, secret=b""))
    driver.handle(SenderDown(b"a", "peer lost"))
    driver.now += RETURN_S + 0.1
    told = [effect for effect in driver.handle(Tick()) if isinstance(effect, Send)]
    assert sorted(effect.member for effect in told if isinstance(effect.message, wire.Refused)) == [b"b", b"c"]
    assert OpenSender(b"b", "b") in driver.send(b"b", hello("b", machine="m", store="/proc/2/fd/3"))
    assert Send(b"b", wire.OpenSender(sender=2, name="c")) in driver.send(b"c", hello("c"))


def test_actors_that_notice_the_death_of_an_actor_before_the_hub_get_another_store() -> None:
    """Else each of them would find that it is gone, and have a session with the hub from then on."""
    driver = Driver(make_run())
    names = "abc"
    hellos = {name: hello(name, machine="m", store=f"/proc/{ord(name)}/fd/3") for name in names}
    for name in names:
        driver.send(name.encode(), hellos[name])
    assert [driver.core.actors[name].route for name in (b"b", b"c")] == [Route(b"a", shared=True)] * 2
    assert OpenSender(b"b", "b") in driver.send(b"b", hellos["b"])
    driver.send(b"c", hellos["c"])
    assert driver.core.actors[b"c"].route == Route(b"b", shared=True)


def test_the_place_of_an_actor_whose_connection_is_lost_is_free() -> None:
    """Its store is gone at once, and those that read it return before the hub gives it up."""
    driver = Driver(make_run(weight_fanout=1))
    driver.send(b"a", hello("a"))
    driver.handle(SenderUp(b"a", "10.0.0.1", 4000))
    driver.send(b"d", hello("d", machine="m", store="/proc/1/fd/3"))
    driver.send(b"a", wire.SenderUp(sender=1, host="10.0.0.2", port=5000, secret=b""))
    reader = hello("e", machine="m", store="/proc/2/fd/3")
    driver.send(b"e", reader)
    driver.handle(Disconnected(b"d"))
    assert Send(b"a", wire.OpenSender(sender=2, name="e")) in driver.send(b"e", reader)


def test_an_actor_whose_source_does_not_answer_is_served_by_the_hub_before_it_gives_up() -> None:
    driver = Driver(make_run(weight_fanout=1))
    driver.send(b"a", hello("a"))
    driver.handle(SenderUp(b"a", "10.0.0.1", 4000))
    driver.send(b"b", hello("b"))
    driver.now += OPEN_S - 1
    assert driver.send(b"b", hello("b")) == []
    driver.now += 2
    assert driver.send(b"b", hello("b")) == [Send(b"a", wire.CloseSender(sender=1)), OpenSender(b"b", "b")]
    assert driver.send(b"b", hello("b")) == [], "the hub is starting its weight sender"


def test_an_actor_may_get_the_weights_from_the_folder_of_its_run() -> None:
    driver = Driver(make_run(weight_folder="s3://bucket/run", weight_fanout=1), run_id="1f")
    (sent,) = driver.send(b"a", hello("a", road="folder"))
    assert isinstance(sent, Send) and isinstance(sent.message, wire.Welcome)
    assert (sent.message.folder, sent.message.session_port) == ("s3://bucket/run/1f", 0)
    assert driver.send(b"b", hello("b")) == [OpenSender(b"b", "b")], "it has no store that others could be served from"


def test_without_a_folder_such_an_actor_is_refused_for_good() -> None:
    driver = Driver(make_run())
    (sent,) = driver.send(b"a", hello("a", road="folder"))
    assert isinstance(sent, Send) and isinstance(sent.message, wire.Refused)
    assert sent.message.final and "hub.weight_folder" in sent.message.reason


@pytest.mark.parametrize("fanout", [0, 1])
def test_the_source_is_told_by_which_road_an_actor_gets_its_weights(fanout: int) -> None:
    driver = Driver(make_run(weight_fanout=fanout))
    driver.send(b"a", hello("a"))
    effects = driver.send(b"b", hello("b", road="sockets"))
    expected = (
        Send(b"a", wire.OpenSender(sender=1, name="b", road="sockets")) if fanout else OpenSender(b"b", "b", "sockets")
    )
    assert effects == [expected]

"""The quarantine finds requests that kill servers and blames no others."""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.engines.sglang.serving.quarantine import (
    ISOLATE_AFTER,
    Quarantine,
    ServerLoad,
    server_for_request,
    server_for_suspect,
)


def server(running: int = 0, *, room: int = 4, suspect: bool = False) -> ServerLoad:
    return ServerLoad(running=running, room=room, suspect=suspect)


def test_deaths_of_co_running_requests_make_suspects_but_blame_none() -> None:
    quarantine = Quarantine()
    for deaths in range(1, 6):
        assert quarantine.record_death(["a", "b"]) is None
        assert quarantine.deaths("a") == deaths
        assert quarantine.is_suspect("a") == (deaths >= ISOLATE_AFTER)


def test_a_suspect_is_blamed_for_a_death_while_it_runs_alone() -> None:
    quarantine = Quarantine()
    assert quarantine.record_death(["a"]) is None  # alone, but its first death: servers also die by themselves
    assert quarantine.record_death(["a", "b"]) is None
    assert quarantine.record_death(["a"]) == "a"
    assert quarantine.deaths("a") == 3 and quarantine.deaths("b") == 1


def test_a_cancelled_request_that_still_runs_counts_as_co_running() -> None:
    quarantine = Quarantine()
    for _ in range(ISOLATE_AFTER):
        quarantine.record_death(["a"])
    assert quarantine.record_death(["a"], others=1) is None and quarantine.record_death(["a"]) == "a"


def test_deaths_of_a_finished_request_are_forgotten() -> None:
    quarantine = Quarantine()
    for _ in range(ISOLATE_AFTER):
        quarantine.record_death(["a", "b"])
    quarantine.forget("a")
    assert not quarantine.is_suspect("a") and quarantine.is_suspect("b")
    quarantine.forget("unknown")
    assert quarantine.record_death([]) is None


def test_a_suspect_waits_for_an_empty_server_and_for_running_suspects() -> None:
    assert server_for_suspect([server(3), server(0)]) == 1
    assert server_for_suspect([server(3), server(1)]) is None
    assert server_for_suspect([server(0, room=0), server(2)]) is None  # without free slots
    assert server_for_suspect([server(1, suspect=True), server(0)]) is None


def test_other_requests_go_to_the_server_with_most_room_but_never_run_with_a_suspect() -> None:
    assert server_for_request([server(3, room=1), server(1, room=3)], suspect_waits=False) == 1
    assert server_for_request([server(3, room=1), server(1, room=3, suspect=True)], suspect_waits=False) == 0
    assert server_for_request([server(1, suspect=True)], suspect_waits=True) is None
    assert server_for_request([server(4, room=0)], suspect_waits=False) is None


def test_the_server_with_the_fewest_requests_is_reserved_for_a_waiting_suspect() -> None:
    assert server_for_request([server(3, room=1), server(1, room=3)], suspect_waits=True) == 0
    assert server_for_request([server(1, room=3)], suspect_waits=True) is None
    assert (
        server_for_request([server(3, room=1), server(1, room=3, suspect=True)], suspect_waits=True) == 0
    )  # the running suspect finishes first


@dataclass
class Simulation:
    """Servers that die when a killer request runs, and sometimes by themselves."""

    killers: frozenset[int]
    slots: int
    servers: list[list[int]]
    waiting: deque[int]
    suspects: deque[int] = field(default_factory=deque)
    quarantine: Quarantine = field(default_factory=Quarantine)
    finished: set[int] = field(default_factory=set)
    blamed: set[int] = field(default_factory=set)
    alone_at_death: set[int] = field(default_factory=set)

    def dispatch(self) -> None:
        while self.suspects and (i := server_for_suspect(self.loads())) is not None:
            self.servers[i].append(self.suspects.popleft())
        while self.waiting and (i := server_for_request(self.loads(), suspect_waits=bool(self.suspects))) is not None:
            self.servers[i].append(self.waiting.popleft())
        for running in self.servers:
            assert len(running) <= self.slots
            assert len(running) == 1 or not any(map(self.quarantine.is_suspect, running))

    def loads(self) -> list[ServerLoad]:
        return [
            ServerLoad(
                running=len(running),
                room=self.slots - len(running),
                suspect=any(map(self.quarantine.is_suspect, running)),
            )
            for running in self.servers
        ]

    def step(self, i: int, choice: int) -> None:
        """Finish one of the requests on server i; a killer request kills the server instead."""
        if not (running := self.servers[i]):
            return
        id = running[choice % len(running)]
        if id in self.killers:
            self.die(i)
        else:
            running.remove(id)
            self.finished.add(id)
            self.quarantine.forget(id)

    def die(self, i: int) -> None:
        in_flight, self.servers[i] = self.servers[i], []
        if len(in_flight) == 1:
            self.alone_at_death.add(in_flight[0])
        if (blamed := self.quarantine.record_death(in_flight)) is not None:
            self.blamed.add(blamed)
            in_flight = [id for id in in_flight if id != blamed]
        for id in reversed(in_flight):
            (self.suspects if self.quarantine.is_suspect(id) else self.waiting).appendleft(id)


@given(
    requests=st.integers(1, 24),
    killers=st.sets(st.integers(0, 23), max_size=4),
    slots=st.integers(1, 8),
    servers=st.integers(1, 3),
    accidents=st.integers(0, 6),
    data=st.data(),
)
def test_killers_are_blamed_and_all_other_requests_finish(
    requests: int, killers: set[int], slots: int, servers: int, accidents: int, data: st.DataObject
) -> None:
    simulation = Simulation(
        killers=frozenset(killers & set(range(requests))),
        slots=slots,
        servers=[[] for _ in range(servers)],
        waiting=deque(range(requests)),
    )
    steps = 0
    while len(simulation.finished) + len(simulation.blamed) < requests:
        simulation.dispatch()
        busy = [i for i, running in enumerate(simulation.servers) if running]
        assert busy, "requests wait, but none runs"
        i = data.draw(st.sampled_from(busy))
        if accidents and data.draw(st.integers(0, 9)) == 0:
            accidents -= 1
            simulation.die(i)
        else:
            simulation.step(i, data.draw(st.integers(0, slots - 1)))
        steps += 1
        assert steps < requests * 4 + 50
    for id in simulation.blamed - simulation.killers:  # only after an accident while the request ran alone
        assert id in simulation.alone_at_death and simulation.quarantine.deaths(id) == ISOLATE_AFTER + 1
    assert simulation.killers <= simulation.blamed
    assert all(simulation.quarantine.deaths(id) == ISOLATE_AFTER + 1 for id in simulation.killers)

"""How the processes of a run meet before JAX knows of them: everyone calls on process 0, which looks at them all.

JAX's own service aborts a process that cannot reach the others, without a word to Python. So they meet here first, on
the coordinator's port, and only those that fit together are told the port of JAX's service.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from easydel.distributed.find import Place
from easydel.distributed.fingerprint import differences
from easydel.distributed.link import Link
from easydel.errors import DistributedError


@dataclass(frozen=True)
class Member:
    """One process of a run.

    Attributes:
        process: its number.
        host: its host's name.
        pid: the number that the system gave it.
    """

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Met:
    """What a meeting ends with.

    Attributes:
        members: all processes, in order.
        links: by process; of process 0 to all others, of these to process 0.
        port: on the coordinator's host, for JAX's service.
        limit: seconds of silence, as process 0 has it.
    """

    members: tuple[Member, ...]
    links: dict[int, Link]
    port: int
    limit: float


def meet(place: Place, mine: dict[str, str], wait: float, limit: float) -> Met:
    """Meet the other processes of the run.

    Args:
        place: of this process.
        mine: its fingerprint.
        wait: seconds until all must have come.
        limit: seconds of silence after which a process counts as lost; that of process 0 holds for all.

    Raises:
        DistributedError: somebody has not come, or does not fit; every process that came is told.
    """
    me = Member(place.process_id, socket.gethostname(), os.getpid())
    end = time.monotonic() + wait
    return _receive_all(place, me, mine, end, wait, limit) if me.process == 0 else _call(place, me, mine, end, wait)


# ---------------------------------------------------------------------- process 0
def _receive_all(place: Place, me: Member, mine: dict[str, str], end: float, wait: float, limit: float) -> Met:
    members: dict[int, Member] = {0: me}
    links: dict[int, Link] = {}
    with _listen(place) as listener:
        try:
            while len(members) < place.processes:
                caller = _next_caller(listener, end)
                if caller is None:
                    absent = [n for n in range(place.processes) if n not in members]
                    raise DistributedError(
                        f"{_list(absent)} of {place.processes} did not come to {place.coordinator} within {wait:g} s; "
                        f"here are {', '.join(map(str, members.values()))}. Are all started, with the same coordinator "
                        "and number of processes, and may they reach this port?"
                    )
                link, hello = caller
                member = Member(*(hello[name] for name in ("process", "host", "pid")))
                if (known := members.get(member.process)) is not None and not _has_gone(links.get(member.process)):
                    links[-1] = link
                    raise DistributedError(f"two processes have the same process_id: {known} and {member}")
                members[member.process], links[member.process] = member, link
                _check_fits(place, me, mine, member, hello)
        except DistributedError as error:
            for link in links.values():
                link.send({"kind": "refused", "why": str(error)})
                link.close()
            raise
    everyone = tuple(members[number] for number in range(place.processes))
    met = Met(everyone, links, _free_port(), limit)
    welcome = {"kind": "welcome", "members": [asdict(member) for member in everyone], "port": met.port, "limit": limit}
    for link in links.values():
        link.send(welcome)
    return met


def _check_fits(place: Place, me: Member, mine: dict[str, str], member: Member, hello: dict[str, Any]) -> None:
    if hello["processes"] != place.processes:
        raise DistributedError(f"{me} counts {place.processes} processes, {member} counts {hello['processes']}")
    if lines := differences(mine, hello["fingerprint"], str(me), str(member)):
        raise DistributedError(
            f"{me} and {member} do not fit together; give all processes the same versions, code and configuration:\n  "
            + "\n  ".join(lines)
        )


def _has_gone(link: Link | None) -> bool:
    """Whether who came has left again, such as a process that was restarted before all had come."""
    if link is None:
        return False
    link.receive_one(0.01)
    if not link.is_open:
        link.close()
    return not link.is_open


def _next_caller(listener: socket.socket, end: float) -> tuple[Link, dict[str, Any]] | None:
    while (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connected, _ = listener.accept()
        except TimeoutError:
            return None
        link = Link(connected)
        hello = link.receive_one(min(5.0, left))
        if hello is not None and hello.get("kind") == "hello":
            return link, hello
        link.close()  # a stranger, such as one that looks for open ports
    return None


def _listen(place: Place) -> socket.socket:
    try:
        family = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(("", place.port), family=family, backlog=max(128, place.processes))
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot listen on {place.coordinator}: {error}; does another run use the port?"
        ) from error


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"


# ---------------------------------------------------------------------- the others
def _call(place: Place, me: Member, mine: dict[str, str], end: float, wait: float) -> Met:
    problem = "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            link = Link(socket.create_connection((place.host, place.port), min(5.0, left)))
        except OSError as error:
            problem = str(error)
            time.sleep(0.2)
            continue
        link.send({"kind": "hello", "processes": place.processes, "fingerprint": mine, **asdict(me)})
        # Process 0 gives up a moment before, and says why: that is worth waiting for.
        answer = link.receive_one(end + 5 - time.monotonic())
        if answer is None:
            link.close()
            problem = "process 0 was there, and has gone again"
            continue
        if answer["kind"] == "refused":
            link.close()
            raise DistributedError(answer["why"])
        members = tuple(Member(**member) for member in answer["members"])
        return Met(members, {0: link}, answer["port"], answer["limit"])
    raise DistributedError(
        f"{me} did not reach process 0 at {place.coordinator} within {wait:g} s ({problem}); is it started there, and "
        "may this host reach the port?"
    )

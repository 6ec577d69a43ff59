"""What is told when a run stops because one of its processes is lost: who, where, since when, and how to go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from easydel.distributed.meeting import Member


@dataclass
class Status:
    """What a process was doing when it last told.

    Attributes:
        phase: such as `"step"` or `"saving"`.
        step: of the run; `None` before the first.
        seconds: in this phase.
        checkpoints: the folder from which the run would be taken up; `None`: not known.
    """

    phase: str = "starting"
    step: int | None = None
    seconds: float = 0.0
    checkpoints: str | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f"at step {self.step}, "
        return f"{step}{self.phase} for {self.seconds:.1f} s"


@dataclass(frozen=True)
class Verdict:
    """Which process is lost, and why.

    Attributes:
        member: the process.
        what: what it did, as the end of a sentence about it.
        status: the last that it told.
        silent: seconds since it gave a sign of life.
    """

    member: Member
    what: str
    status: Status
    silent: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as it is sent."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """Read what `to_dict` made."""
        return cls(Member(**values["member"]), values["what"], Status(**values["status"]), values["silent"])

    def text(self, processes: int, me: Member, mine: Status) -> str:
        """Return the message for the log of a process.

        Args:
            processes: of the run.
            me: the process that stops.
            mine: what it was doing.
        """
        member = self.member
        head = f"easydel: process {member.process} of {processes} (host {member.host}, pid {member.pid}) {self.what}"
        return "\n".join([
            head,
            f"  it was: {self.status}; its last sign of life came {self.silent:.1f} s before",
            f"  so this one stops, too: {me}, {mine}",
            f"  {_how_to_go_on(mine.checkpoints or self.status.checkpoints)}",
        ])  # fmt: skip


def _how_to_go_on(checkpoints: str | None) -> str:
    if checkpoints is None:
        return "to go on: start the run again"
    steps = whole_steps(Path(checkpoints))
    if not steps:
        return f"to go on: start the run again, from its beginning: there is no whole checkpoint in {checkpoints}"
    return (
        f"to go on: start the run again, on any number of processes; the last whole checkpoint is that of step "
        f"{steps[-1]} in {checkpoints}"
    )


def whole_steps(directory: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order, without reading any (a torn one has another name)."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())

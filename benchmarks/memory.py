"""Peak memory of a load, each contestant in a process of its own (Linux).

`python -m benchmarks.memory NAME TINY PATH` loads TINY first (imports, compilers, thread pools), resets the kernel's
high-water mark, loads PATH and prints JSON: the resident bytes before, the peak, and the seconds of that first load.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.contestants import EasyDeL, Handwritten, Transformers
from benchmarks.rounds import seconds

CLASSES = {kind.name: kind for kind in (Transformers, Handwritten, EasyDeL)}


def status_bytes(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: this measurement needs Linux")
    return int(match[1]) * 1024


def measure(name: str, tiny: Path, path: Path) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(tiny), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure in this process."""
    name, tiny, path = sys.argv[1:]
    contestant = CLASSES[name]()
    contestant.load(Path(tiny))
    contestant.unload()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    idle = status_bytes("VmRSS")
    took = seconds(lambda: contestant.load(Path(path)))
    print(json.dumps({"idle": idle, "peak": status_bytes("VmHWM"), "seconds": took}))


if __name__ == "__main__":
    main()

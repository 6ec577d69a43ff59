"""A process that imports jax once, and then forks savers that it kills: `python -m tests.hub.killer`.

It reads lines `folder model max_shard_size fraction` and answers each with `killed` or `finished`: a forked child
saves model 0 or 1 into the folder and gets SIGKILL after that fraction of what such a save takes (`WHOLE`: none).
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from tests.hub import checkpoint as ck

WHOLE = 9.0


def models() -> list[Any]:
    """Return two models that differ in weights and config."""
    import easydel

    found = []
    for number in range(2):
        with tempfile.TemporaryDirectory() as folder:
            ck.write(Path(folder), ck.tensors(number), eos_token_id=number + 1)
            found.append(easydel.LlamaForCausalLM.from_pretrained(folder))
            found[-1].config.source_directory = None
    return found


def save_and_die(model: Any, folder: str, size: str, delay: float | None) -> bool:
    """Fork a saver and kill it after `delay` seconds; return whether it had finished."""
    ready, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of forks; this child only reads arrays that are on the host
        child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        model.save_pretrained(folder, max_shard_size=size)
        os._exit(0)
    os.read(ready, 1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(ready)
    os.close(tell)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the saver failed")
    return os.WIFEXITED(status)


def main() -> None:
    """Serve requests until the input ends."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # its import takes longer than all the rest
    both = models()
    times: dict[str, float] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        folder, number, size, fraction = line.split()
        model = both[int(number)]
        if size not in times:
            with tempfile.TemporaryDirectory() as trial:
                save_and_die(both[0], trial, size, None)
                start = time.perf_counter()
                save_and_die(both[1], trial, size, None)
                times[size] = time.perf_counter() - start
        share = float(fraction)
        finished = save_and_die(model, folder, size, share * times[size] if share < WHOLE else None)
        print("finished" if finished else "killed", flush=True)


if __name__ == "__main__":
    main()

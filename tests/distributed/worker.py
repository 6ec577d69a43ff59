"""One process of a run; started by `launch.start`."""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings
from pathlib import Path


def main() -> None:
    """Join the run, call the function and keep what it returns."""
    name, number, processes, devices, port, folder, arguments = pickle.loads(bytes.fromhex(sys.argv[1]))
    warnings.simplefilter("error", UserWarning)
    import jax

    from easydel import distributed

    if processes > 1:
        distributed.initialize(f"127.0.0.1:{port}", processes, number)
    module, _, function = name.partition(":")
    result = getattr(importlib.import_module(module), function)(*arguments)
    assert jax.local_device_count() == devices  # not before, as the function may itself join a run
    path = Path(folder) / f"process-{number}.pickle"
    path.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()

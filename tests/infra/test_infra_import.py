"""What importing costs others: nothing printed, no environment, no backend, no torch or transformers."""

from __future__ import annotations

import os
import subprocess
import sys

import easydel
from easydel import infra


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )


def test_importing_changes_nothing():
    done = python(
        "import os, sys; before = dict(os.environ); import easydel; from easydel import EasyDeLBaseModule\n"
        "changed = dict(os.environ) != before\n"
        "loaded = {'torch', 'transformers'} & sys.modules.keys()\n"
        "from jax._src import xla_bridge\n"
        "sys.exit(f'{changed=} {loaded=}' if changed or loaded or xla_bridge.backends_are_initialized() else 0)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_alone_loads_no_jax():
    done = python(
        "import sys, easydel; sys.exit(str({'jax', 'flax', 'transformers', 'torch'} & sys.modules.keys() or '') or 0)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_every_name_starts_no_backend_and_no_torch():
    done = python(
        "import sys, easydel\nfor name in dir(easydel): getattr(easydel, name)\n"
        "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_resolves():
    names = [name for name in dir(easydel) if not name.startswith("_")]
    assert {"EasyDeLBaseModule", "LlamaForCausalLM", "LossConfig", "register_module", "AutoEasyDeLModel"} <= {*names}
    assert [name for name in names if getattr(easydel, name, None) is None] == []
    assert {*easydel.__all__} <= {*names}
    assert [name for name in infra.__all__ if getattr(infra, name, None) is None] == []


def test_an_unknown_name_is_an_attribute_error():
    for module in (easydel, infra):
        assert not hasattr(module, "EasyDelBaseModel")
    done = python("from easydel import Nothing")
    assert "cannot import name 'Nothing' from 'easydel'" in done.stderr

"""A checkpoint is the same wherever it was written, and the page that says how runs are started is right."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from easydel.cli.app import app
from easydel.distributed.find import VARIABLES
from tests.distributed import runs
from tests.distributed.forks import Server, result
from tests.distributed.uninterrupted import saved_arrays

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_a_checkpoint_goes_from_mesh_to_mesh_bit_by_bit(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "checkpoints"
    stations = [
        (1, 8, (1, 8, 1, 1, 1), [2, 24]),
        (2, 4, (1, 4, 1, 2, 1), [4, 12]),
        (4, 2, (2, 2, 1, 2, 1), [8, 12]),
        (1, 4, (1, 2, 1, 2, 1), [8, 12]),
    ]
    for step, (processes, devices, dims, kernel) in enumerate(stations):
        with server.run(runs.pass_on, processes, devices, tmp_path / str(step), str(out), dims, step) as started:
            assert [one.wait(60) for one in started] == [0] * processes, started[0].log.read_text()
        assert result(tmp_path / str(step), 0)["params/kernel"] == kernel
    wanted = runs.values_to_pass_on()
    for name, array in saved_arrays(out, len(stations) - 1, wanted).items():
        assert array.tobytes() == wanted[name].tobytes(), name


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_manifest_of_the_page_tells_what_is_read() -> None:
    service, job = (part for text in fences("yaml") for part in yaml.safe_load_all(text))
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    told = {entry["name"]: entry["value"] for entry in container["env"]}
    assert told.keys() <= set(VARIABLES.values())
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert told[VARIABLES["coordinator"]].rpartition(":")[0] == host
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(told[VARIABLES["processes"]]) == spec["completions"] == spec["parallelism"]
    assert (service["spec"]["clusterIP"], spec["completionMode"]) == ("None", "Indexed")


def test_the_scripts_of_the_page_are_bash_and_use_options_that_there_are() -> None:
    known = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    scripts = fences("bash")
    assert len(scripts) >= 3
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        if "easydel train" in script:
            for option in re.findall(r" (--(?:coordinator|process\S*)) ", script):
                assert option in known


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2"], "processes=2 given, but not coordinator, process_id"),
        (["--coordinator", "here:1", "--processes", "2", "--process-id", "2"], "process_id=2 is none of 0 to 1"),
        (["--peer-timeout", "0"], "peer_timeout=0.0: expected a number of seconds above 0"),
    ],
)
def test_options_that_make_no_sense_are_told_in_a_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {model_type: llama, tokenizer: stdlib-4m}\ntraining: {output_dir: out}\n")
    done = CliRunner().invoke(app, ["train", str(file), *arguments])
    assert done.exit_code == 1
    assert f"error: {said}" in done.stderr

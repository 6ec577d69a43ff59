"""`easydel lora`: what an adapter in PEFT's files is, and folding it into its base."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from easydel.cli.tables import bytes_text, count_text
from easydel.errors import UnsupportedError
from easydel.infra.adapter_files import PEFT_TASKS
from easydel.infra.registry import get_module_class
from easydel.infra.source import model_class, read_config
from easydel.lora.peft_files import AdapterFiles, read_adapter
from easydel.lora.peft_match import PREFIX
from easydel.sharding.explain_text import WIDTH, over_layers

DTYPES = ("float32", "bfloat16", "float16")


def run_merge(
    base: str,
    adapter: str,
    out: Path,
    *,
    weight: float = 1.0,
    also: Sequence[str] = (),
    dtype: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
) -> None:
    """Fold adapters into their base and write the model.

    Args:
        base: a folder or a Hub id.
        adapter: likewise; its class of model is that of its `task_type`, else the one that the base's config names.
        out: the folder to write into.
        weight: of the adapter.
        also: further ones, each as `name=weight`.
        dtype: to store in; `None`: as the base is stored.
        revision: of the base.
        adapter_revision: of the adapter.

    Raises:
        ValueError: `out` is where the base or an adapter is, or `also` is not of that form.
        CheckpointError: something cannot be read or does not fit.
        UnsupportedError: an unknown dtype, or an adapter that is not offered here.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(f"--dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    wanted = [(adapter, weight), *map(_weighted, also)]
    for source in (base, *(name for name, _ in wanted)):
        if Path(source).is_dir() and out.resolve() == Path(source).resolve():
            raise ValueError(f"{out}: is where {source!r} is read from; choose another folder to write into")
    first = read_adapter(adapter, revision=adapter_revision)
    with jax.default_device(jax.devices("cpu")[0]):
        model = _load_base(base, first, revision, dtype)
        _add_all(model, wanted, adapter_revision)
        model.merge_and_unload()
        if dtype is not None:
            model.to_dtype(dtype)
        model.save_pretrained(out)
    print(f"{out}: {base} with {', '.join(f'{w:g} × {name}' for name, w in wanted)}")


def run_info(adapter: str, *, revision: str | None = None, as_json: bool = False) -> None:
    """Print what an adapter is, from its config and the header of its weights.

    Args:
        adapter: a folder or a Hub id.
        revision: on the Hub.
        as_json: print a dictionary instead of tables.
    """
    files = read_adapter(adapter, revision=revision)
    about = describe_adapter(files)
    if as_json:
        print(json.dumps(about, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("adapter", adapter)
    for name, value in about.items():
        if name != "layers" and value not in (None, [], {}):
            facts.add_row(name.replace("_", " "), _text(name, value))
    console.print(facts)
    console.print()
    console.print(_layer_table(about["layers"]))


def describe_adapter(files: AdapterFiles) -> dict[str, Any]:
    """Return what an adapter is, as what `json` can write."""
    config, table = files.config, files.table
    return {
        "base_model": config.base_model_name_or_path,
        "revision": config.revision,
        "task": config.task_type,
        "kind": ("DoRA" if config.use_dora else "LoRA") + (" (rsLoRA)" if config.use_rslora else ""),
        "rank": config.r,
        "alpha": config.lora_alpha,
        "scale": config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
        "dropout": config.lora_dropout,
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
        "target_modules": config.target_modules,
        "target_parameters": config.target_parameters,
        "modules_to_save": config.modules_to_save or [],
        "parameters": sum(math.prod(entry.shape) for entry in table.values()),
        "bytes": sum(entry.nbytes for entry in table.values()),
        "dtypes": sorted({str(entry.dtype) for entry in table.values()}),
        "layers": _layers(table),
    }


def _weighted(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (equals and name and math.isfinite(weight)):
        raise ValueError(f"--also {text!r}: expected an adapter and its weight, such as folder=0.5")
    return name, weight


def _load_base(base: str, adapter: AdapterFiles, revision: str | None, dtype: str | None) -> Any:
    config = read_config(base)
    tasks = [task for task, name in PEFT_TASKS.items() if name == adapter.config.task_type]
    made = get_module_class(tasks[0], config.model_type) if tasks else model_class(config)
    # In any other type the sum is rounded once, when it is stored.
    stored = "float32" if dtype == "float32" else None
    new = [re.escape(name) for name in adapter.config.modules_to_save or ()]
    return made.from_pretrained(base, revision=revision, param_dtype=stored, allow_new=new)


def _add_all(model: Any, wanted: Sequence[tuple[str, float]], revision: str | None) -> None:
    """Give a model all adapters, and make their weighted sum, which is exact, the active one."""
    names = [f"adapter{place}" for place in range(len(wanted))]
    for place, (source, _) in enumerate(wanted):
        model.load_adapter(source, names[place], revision=None if place else revision)
    if len(wanted) > 1 or wanted[0][1] != 1.0:
        model.add_weighted_adapter(names, [weight for _, weight in wanted], "sum", combination_type="cat")
        model.set_adapter("sum")


def _layers(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the adapted layers have, those together that differ in their number only."""
    groups: dict[str, dict[str, Any]] = {}
    for key, entry in table.items():
        name = key.removeprefix(PREFIX)
        layer, _, end = name.partition(".lora_")
        module = over_layers((layer if end else name.rpartition(".")[0]).replace(".", "/")).replace("/", ".")
        group = groups.setdefault(module, {"module": module, "count": 0, "shapes": [], "parameters": 0})
        part = f"lora_{end}".removesuffix(".weight") if end else name.rpartition(".")[2]
        shown = f"{part} {' × '.join(map(str, entry.shape))}"
        if shown not in group["shapes"]:
            group["shapes"].append(shown)
        group["count"] += part in ("lora_A", "lora_embedding_A") or (not end and part == "weight")
        group["parameters"] += math.prod(entry.shape)
    return [groups[name] for name in sorted(groups)]


def _text(name: str, value: Any) -> str:
    if name == "parameters":
        return count_text(value)
    if name == "bytes":
        return bytes_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("×", justify="right")
    table.add_column("tensors")
    table.add_column("parameters", justify="right")
    for group in layers:
        table.add_row(group["module"], str(group["count"]), ", ".join(group["shapes"]), count_text(group["parameters"]))
    return table

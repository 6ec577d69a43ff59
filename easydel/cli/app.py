"""The commands and their options; what they do is in the module of the same name, loaded when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Load, inspect, run and fine-tune Hugging Face checkpoints in JAX.",
    no_args_is_help=True,
    rich_markup_mode=None,  # "[default: …]" is text
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

lora_app = typer.Typer(
    help="LoRA adapters in PEFT's files: what one is, and folding it into its base.",
    no_args_is_help=True,
    rich_markup_mode=None,  # "[default: …]" is text
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lora_app, name="lora")


def _print_version(wanted: bool) -> None:
    if wanted:
        from easydel import __version__

        typer.echo(f"easydel {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    context.obj = traceback


@contextmanager
def _one_line_errors(context: typer.Context) -> Iterator[None]:
    """Turn what a user can mend (a wrong value, a missing file, a broken checkpoint) into a line and exit code 1."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if context.obj:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def demo(
    context: typer.Context,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text file to fine-tune on [default: Richard III, Act I]."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the fine-tuned model and its loss curve.")] = Path(
        "easydel-demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each sample.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of the order of the text.")] = 0,
) -> None:
    """Load the embedded model, generate, fine-tune it on a text, save, reload and generate again."""
    with _one_line_errors(context):
        from easydel.cli.demo import run_demo

        run_demo(text=text, output=output, steps=steps, new_tokens=tokens, seed=seed)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id [default: the embedded model].")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that sum to this.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many likeliest tokens; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    dtype: Annotated[str, typer.Option(help="Compute in float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Continue a prompt; the text appears as it is made."""
    with _one_line_errors(context):
        from easydel.cli.generate import run_generate

        run_generate(
            model=model, prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            top_k=top_k, seed=seed, dtype=dtype,
        )  # fmt: skip


@app.command()
def chat(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id [default: the embedded model].")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is --greedy [default: the checkpoint's, else 0.7].")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens that sum to this [default: the checkpoint's, else 0.95]."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End an answer after so many tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="The same seed and messages give the same answers.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time.")] = False,
    dtype: Annotated[str, typer.Option(help="Compute in float32, bfloat16 or float16.")] = "float32",
    quantization: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Quantize while loading, such as nf4 or 8bit.")
    ] = None,
) -> None:
    """Talk with a model; answers appear as they are made. Each line is a message, /help shows the commands."""
    with _one_line_errors(context):
        from easydel.cli.chat import run_chat

        run_chat(
            model=model, system=system, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed,
            greedy=greedy, dtype=dtype, quantization=quantization,
        )  # fmt: skip


@app.command()
def train(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="CONFIG.yaml", help="Model, data and run.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.NAME=VALUE", help="Set a value of the file; may be repeated."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Load everything, say what would be trained, and stop.")
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(envvar="EASYDEL_COORDINATOR", metavar="HOST:PORT", help="Of process 0, if there are several."),
    ] = None,
    processes: Annotated[int | None, typer.Option(envvar="EASYDEL_PROCESSES", help="How many there are.")] = None,
    process_id: Annotated[
        int | None, typer.Option(envvar="EASYDEL_PROCESS_ID", help="Which of them this is, from 0.")
    ] = None,
    peer_timeout: Annotated[
        float | None,
        typer.Option(envvar="EASYDEL_PEER_TIMEOUT", help="Seconds of silence before one counts as lost [default: 60]."),
    ] = None,
) -> None:
    """Train as a YAML file says; the same command goes on where a run was stopped.

    Started in several processes it is one run; SLURM, Kubernetes, Open MPI and TPU pods tell each which it is.
    """
    with _one_line_errors(context):
        from easydel.cli.train import Placing, run_train

        place = Placing(coordinator, processes, process_id, peer_timeout)
        code = run_train(config, settings or [], check=check, place=place)
    if code:
        raise typer.Exit(code)


@app.command(name="inspect")
def inspect_checkpoint(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="DIR_OR_ID", help="Folder or Hub id of a checkpoint.")],
    sharding: Annotated[bool, typer.Option("--sharding", help="Show which rule splits what, and why.")] = False,
    mesh: Annotated[
        str | None,
        typer.Option(metavar="AXIS=SIZE,…", help="Mesh for --sharding, such as fsdp=4,tp=2; it need not exist here."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the sharding into a .png or .html file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sharding as JSON.")] = False,
) -> None:
    """Show a checkpoint's configuration, parameters and memory; weights are not read."""
    with _one_line_errors(context):
        from easydel.cli.inspect import run_inspect, run_sharding

        if sharding:
            run_sharding(model, mesh, picture=picture, as_json=as_json)
        elif mesh is not None or picture is not None or as_json:
            raise ValueError("--mesh, --picture and --json go with --sharding")
        else:
            run_inspect(model)


def _task(value: str | None) -> str | None:
    if value is not None:
        from easydel.infra.registry import as_task

        try:
            as_task(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return value


@app.command(name="verify")
def verify_checkpoint(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="DIR_OR_ID", help="Folder or Hub id of a checkpoint.")],
    task: Annotated[
        str | None,
        typer.Option(callback=_task, help="Such as causal-lm; without it that of the config's architectures."),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Both compute in this.")] = "float32",
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Largest relative error allowed; without it 1e-4, in bfloat16 5e-2."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows of random tokens, 2 by default; the last of several is padded.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row, 16 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random tokens, 0 by default.")] = None,
    text: Annotated[str | None, typer.Option(help="Compare on this text, with the checkpoint's tokenizer.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Compare a checkpoint with transformers, layer by layer, and name the first module that differs.

    Exit code 0: equal; 1: it differs, or does not load. torch must be installed.
    """
    if text is not None and (batch, length, seed) != (None, None, None):
        raise typer.BadParameter("--batch, --length and --seed are of random tokens: they do not go with --text")
    with _one_line_errors(context):
        from easydel.cli.verify import run_verify

        equal = run_verify(
            model, task=task, dtype=dtype, tolerance=tolerance, batch=batch, length=length, seed=seed, text=text,
            revision=revision, as_json=as_json,
        )  # fmt: skip
    if not equal:
        raise typer.Exit(1)


@app.command(name="plan")
def plan_step(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="DIR_OR_ID", help="Folder with a config.json, or Hub id; weights are not needed.")
    ],
    mesh: Annotated[
        str | None, typer.Option(metavar="AXIS=SIZE,…", help="Such as fsdp=64,tp=8; it need not exist here.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Look for a mesh of so many devices instead.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of each device, such as 80GB: must it fit, and does it?")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows over all devices [default: dp·fsdp, one for each part]."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row [default: 4096, or the model's positions if fewer].")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Compute in float32, bfloat16 or float16.")] = "float32",
    param_dtype: Annotated[str, typer.Option(help="Store parameters in this.")] = "float32",
    optimizer: Annotated[str, typer.Option(help="adamw, sgd, lion or adafactor.")] = "adamw",
    remat: Annotated[
        str | None,
        typer.Option(help="none, full, dots or dots_no_batch [default: none; with --devices what fits best]."),
    ] = None,
    scan_layers: Annotated[
        bool | None,
        typer.Option("--scan-layers/--no-scan-layers", help="Layers in a scan [default: above 24 layers]."),
    ] = None,
    cache_length: Annotated[
        int | None, typer.Option(min=1, help="Positions of the cache of generation [default: --sequence-length].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what training takes on each device of a mesh that need not exist here: memory, FLOPs, bytes sent."""
    with _one_line_errors(context):
        from easydel.cli.plan import run_plan

        run_plan(
            model, mesh=mesh, devices=devices, memory=memory, as_json=as_json, batch_size=batch_size,
            sequence_length=sequence_length, dtype=dtype, param_dtype=param_dtype, optimizer=optimizer, remat=remat,
            scan_layers=scan_layers, cache_length=cache_length,
        )  # fmt: skip


@lora_app.command(name="merge")
def merge_adapter(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub id of the model it was trained on.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of the adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", file_okay=False, help="Folder for the merged model.")],
    weight: Annotated[float, typer.Option(help="What the adapter is multiplied by.")] = 1.0,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER=WEIGHT", help="Another adapter, added with this weight; may be repeated."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store in float32, bfloat16 or float16 [default: as the base is stored].")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="Likewise, of the adapter.")] = None,
) -> None:
    """Fold adapters into their base, on the CPU, and write a model that transformers loads."""
    with _one_line_errors(context):
        from easydel.cli.lora import run_merge

        run_merge(
            base, adapter, out, weight=weight, also=also or [], dtype=dtype, revision=revision,
            adapter_revision=adapter_revision,
        )  # fmt: skip


@lora_app.command(name="info")
def adapter_info(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of an adapter.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what an adapter is: rank, alpha, layers, parameters, base; weights are not read."""
    with _one_line_errors(context):
        from easydel.cli.lora import run_info

        run_info(adapter, revision=revision, as_json=as_json)

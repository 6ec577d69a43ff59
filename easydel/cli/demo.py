"""`easydel demo`: the main ways through the library on real weights, in about a minute."""

from __future__ import annotations

import functools
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from easydel.assets import embedded_model_path, embedded_text_path, embedded_validation_path
from easydel.cli.tables import bytes_text, group_parameters, parameter_table
from easydel.cli.text import encode_text, load_model, load_tokenizer, stream_text
from easydel.training import Trainer, TrainingArguments, WindowedText, measure_perplexity
from easydel.training.logs import Record, draw_curves

CODE_PROMPT = "def read_lines(path):\n"
LENGTH, BATCH_SIZE, HELD_OUT_SHARE = 128, 8, 0.1
PEAK_RATE = 1e-3
PLOT_MISSING = "matplotlib is missing, no picture is drawn; install it with: pip install 'easydel-base[plot]'"


class Corpus(NamedTuple):
    """What the demo learns from, what it is measured on, and Python, which it may forget meanwhile."""

    name: str
    prompt: str
    train: WindowedText
    held_out: WindowedText
    python: WindowedText


def run_demo(*, text: Path | None, output: Path, steps: int, new_tokens: int, seed: int) -> None:
    """Run the demo's sections one after the other and say how long they took."""
    began = time.perf_counter()
    console = Console(highlight=False)
    model, tokenizer = load_section(console)
    corpus = read_corpus(text or embedded_text_path(), tokenizer)

    console.rule("2  Generate", align="left")
    show_sample(console, model, tokenizer, CODE_PROMPT, new_tokens, seed)

    console.rule(f"3  Fine-tune on {corpus.name}", align="left")
    model, records = fine_tune_section(console, model, corpus, steps, seed)

    console.rule("4  Save and reload", align="left")
    reload_section(console, model, tokenizer, output, corpus)

    console.rule("5  Generate again", align="left")
    show_sample(console, model, tokenizer, corpus.prompt, new_tokens, seed)

    picture = output / "loss.png"
    curve = draw(records, picture, f"Fine-tuning stdlib-4m on {corpus.name}")
    console.rule()
    console.print(f"loss curve: {curve}")
    console.print(f"model:      {output}  (try: easydel generate --model {output} --prompt …)")
    console.print(f"done in {time.perf_counter() - began:.0f} s")


def draw(records: list[Record], picture: Path, title: str) -> str:
    """Draw the loss curve, and return its file, or how to have it drawn."""
    if find_spec("matplotlib") is None:
        return PLOT_MISSING
    draw_curves(records, picture, title)
    return str(picture)


def load_section(console: Console) -> tuple[Any, Any]:
    """Load model and tokenizer, place the parameters on the devices, and show them."""
    console.rule("1  Load", align="left")
    began = time.perf_counter()
    path = embedded_model_path()
    model, tokenizer = load_model(path), load_tokenizer(path)
    model.shard_model()
    seconds = time.perf_counter() - began
    mesh = " × ".join(f"{name} {size}" for name, size in model.mesh.shape.items())
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device{'s' if jax.device_count() > 1 else ''}"
    console.print(f"{path.name}: a small Llama that has read Python's standard library, loaded in {seconds:.1f} s")
    console.print(f"{devices}, mesh {mesh}\n")
    console.print(parameter_table(group_parameters(model.params, model._specs_sharding())))
    files = sum(file.stat().st_size for file in path.iterdir())
    console.print(f"\non disk {bytes_text(files)} (bfloat16), computed in {model.module_dtype}\n")
    return model, tokenizer


def read_corpus(path: Path, tokenizer: Any) -> Corpus:
    """Read the text to learn, keep its last tenth apart, and read the Python text the model is measured on.

    Raises:
        ValueError: the text is too short or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it first") from error
    tokens = encode_text(tokenizer, text)
    split = int(len(tokens) * (1 - HELD_OUT_SHARE))
    if len(tokens) - split < LENGTH:
        raise ValueError(
            f"{path}: {len(tokens)} tokens are too few, at least {int(LENGTH / HELD_OUT_SHARE)} are needed"
        )
    python = encode_text(tokenizer, embedded_validation_path().read_text(encoding="utf-8"))
    parts = [
        WindowedText(part, LENGTH, tokenizer.bos_token_id) for part in (tokens[:split], tokens[split:], python[:2000])
    ]
    first_line = text.strip().split("\n", 1)[0]
    return Corpus(path.name, f"{first_line[:60]}\n", *parts)


def show_sample(console: Console, model: Any, tokenizer: Any, prompt: str, new_tokens: int, seed: int) -> None:
    """Print a prompt and its continuation as it is made, and the speed once everything is compiled."""
    console.print(prompt, style="bold", end="", markup=False)
    options = {"max_new_tokens": new_tokens, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": seed}
    times = []
    for piece in stream_text(model, tokenizer, prompt, **options):
        console.print(piece, end="", markup=False, soft_wrap=True)
        times.append(time.perf_counter())
    console.print("\n")
    if len(times) > 3:  # the first two tokens wait for the compiler (prompt, loop), and the last piece is no token
        console.print(f"{(len(times) - 3) / (times[-2] - times[1]):.0f} tokens/s\n", style="dim")


def fine_tune_section(console: Console, model: Any, corpus: Corpus, steps: int, seed: int) -> tuple[Any, list[Record]]:
    """Train with a progress bar; show the perplexity before and after."""
    before = _perplexities(model, corpus)
    console.print(
        f"{len(corpus.train.tokens):,} tokens to learn from, {len(corpus.held_out.tokens):,} held out; "
        f"{steps} steps of {BATCH_SIZE} × {LENGTH} tokens, AdamW"
    )
    records: list[Record] = []
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=steps)

        def show(trainer: Trainer, record: Record) -> None:
            records.append(record)
            text = f"loss {record['loss']:.2f}   {record['tokens_per_second']:,.0f} tokens/s"
            progress.update(task, completed=record["step"], description=text)

        arguments = TrainingArguments(
            folder, max_steps=steps, batch_size=BATCH_SIZE, learning_rate=PEAK_RATE, schedule="cosine",
            warmup_ratio=0.1 if steps >= 10 else 0.0, weight_decay=0.01, log_steps=1, save_model=False, log_to=(),
        )  # fmt: skip
        batches = functools.partial(corpus.train.train_batch, batch_size=BATCH_SIZE, seed=seed)
        model = Trainer(model, arguments, batches, callbacks=[show]).train().model
    after = _perplexities(model, corpus)
    for name, old, new in zip((f"{corpus.name}, held out", "Python, held out"), before, after, strict=True):
        console.print(f"perplexity  {name:<28} before {old:7.1f}   after {new:7.1f}")
    console.print()
    return model, records


def reload_section(console: Console, model: Any, tokenizer: Any, output: Path, corpus: Corpus) -> None:
    """Save model and tokenizer, load them again, and compare the logits of one window bit for bit.

    Raises:
        ValueError: the reloaded model computes something else.
    """
    began = time.perf_counter()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    saved = time.perf_counter()
    again = load_model(output).shard_model()
    loaded = time.perf_counter()
    batch = {"input_ids": jnp.asarray(next(corpus.held_out.eval_batches(1))["input_ids"])}
    ours, theirs = (np.asarray(jax.jit(each.pure_transform_fn())(each.params, batch).logits) for each in (model, again))
    difference = float(np.abs(ours - theirs).max())
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    console.print(f"saved {bytes_text(size)} to {output} in {saved - began:.1f} s, reloaded in {loaded - saved:.1f} s")
    if difference:
        raise ValueError(f"{output}: the reloaded model's logits differ by up to {difference:.2e}, expected none")
    console.print("the reloaded model gives the same logits, bit for bit\n")


def _perplexities(model: Any, corpus: Corpus) -> tuple[float, float]:
    parts = (corpus.held_out, corpus.python)
    held_out, python = (measure_perplexity(model, part.eval_batches(BATCH_SIZE)).per_token for part in parts)
    return held_out, python

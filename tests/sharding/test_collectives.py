"""What devices send each other, counted in compiled programs: no more than docs/sharding.md says, kind by kind."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.sharding.collectives import count, program

DP, FSDP, TP, EP, SP = (8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (1, 1, 1, 4, 1), (1, 1, 4, 1, 1), (1, 1, 1, 1, 4)
FSDP_TP, ALL_EP = (1, 2, 1, 4, 1), (1, 2, 2, 2, 1)
FOUR_KV_HEADS = (("num_key_value_heads", 4),)  # as many as devices on tp; the family's tiny config has 2

DOCUMENT = Path(__file__).parents[2] / "docs" / "sharding.md"
TABLE = (
    ("`dp=8`", "llama", DP, ()),
    ("`fsdp=8`", "llama", FSDP, ()),
    ("`tp=4`", "llama", TP, FOUR_KV_HEADS),
    ("`tp=4`, 2 KV heads", "llama", TP, ()),
    ("`fsdp=2, tp=4`", "llama", FSDP_TP, FOUR_KV_HEADS),
    ("`sp=4`", "llama", SP, ()),
    ("`ep=4`", "mixtral", EP, ()),
    ("`fsdp=2, ep=2, tp=2`", "mixtral", ALL_EP, ()),
)
"""The rows of the document's table: mesh, family, sizes of axes, fields."""


def test_counting_sees_definitions_only() -> None:
    text = """
  %all-gather.1 = f32[8]{0} all-gather(%param.1), dimensions={0}
  %start = (f32[1]{0}, f32[8]{0}) all-gather-start(%all-to-all.7), dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  ROOT %sum.2 = (f32[], /*index=1*/f32[4]{0}) all-reduce(%all-gather.1, %done), to_apply=%add
"""
    assert count(text)[0] == {"all-gather": 2, "all-reduce": 1}


@pytest.mark.parametrize("family", ["llama", "mixtral", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_dp_forward_sends_nothing(family: str) -> None:
    assert program(family, DP, "forward").counts == {}


@pytest.mark.parametrize(
    ("family", "fields", "sums"),
    # Each layer sums after attention and after the MLP; T5's decoder also after attention to the encoder. Mamba 2 has
    # one product to sum, and its norm a mean over features that are split between groups; Mamba two products.
    [("llama", FOUR_KV_HEADS, 2), ("t5", (), 5), ("mamba2", (), 2), ("mamba", (), 2),
     *(pytest.param(*row, 2, marks=pytest.mark.slow)
       for row in (("gpt2", ()), ("mixtral", FOUR_KV_HEADS), ("bert", ())))],
)  # fmt: skip
def test_tp_forward_sums_twice_a_layer(family: str, fields: tuple, sums: int) -> None:
    found = program(family, TP, "forward", fields=fields)
    assert found.counts["all-reduce"] <= sums * found.layers + 2
    others = {kind: n for kind, n in found.counts.items() if kind != "all-reduce"}
    # Mamba 2 cuts one projection into parts that end where no device's do: it gathers that, and what it convolves.
    assert others == ({"all-gather": 2 * found.layers} if family == "mamba2" else {})


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [
        ("llama", "sgd"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("gpt2", "adamw"), ("mixtral", "sgd"), ("t5", "sgd"))
        ),
    ],
)
def test_an_fsdp_step_gathers_each_parameter_once(family: str, optimizer: str) -> None:
    """A parameter is used forward and backward; one gathering serves both, where 2 · `split` would be one for each."""
    found = program(family, FSDP, "step", optimizer=optimizer)
    assert found.split > 10
    assert found.counts["all-gather"] <= found.split
    # The number of labels that count, and all gradients together: CPUs have no reduce-scatter.
    assert {kind: n for kind, n in found.counts.items() if kind != "all-gather"}.keys() == {"all-reduce"}


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_scan_does_not_keep_what_it_gathers(family: str) -> None:
    """Each layer's weights are gathered forward and once more backward; kept, they would lie whole on each device."""
    fields = (("scan_layers", True), ("hidden_size", 64), ("intermediate_size", 512))
    found = program(family, FSDP, "step", fields=(*fields, ("num_hidden_layers", 4)))
    assert found.counts["all-gather"] <= 2 * found.split  # a body counts once
    longer = program(family, FSDP, "step", fields=(*fields, ("num_hidden_layers", 12)))
    added = longer.temporaries - found.temporaries
    whole = (longer.parameters - found.parameters) * 4
    assert added < whole / 2, "what each more layer keeps is less than half of its weights"


@pytest.mark.parametrize("what", ["forward", "step"])
def test_fewer_kv_heads_than_tp_are_gathered(what: str) -> None:
    found = program("llama", TP, what)
    assert found.counts.keys() == {"all-reduce", "all-gather"}
    # Keys and values of each layer; backward, their gradients.
    assert found.counts["all-gather"] <= (2 if what == "forward" else 4) * found.layers


@pytest.mark.parametrize(
    ("family", "dims"), [("mixtral", ALL_EP), pytest.param("llama", FSDP_TP, marks=pytest.mark.slow)]
)
def test_fsdp_with_tp_or_ep_gathers_no_more_than_fsdp(family: str, dims: tuple) -> None:
    fields = FOUR_KV_HEADS if family == "llama" else ()
    found = program(family, dims, "step", fields=fields)
    assert found.counts["all-gather"] <= found.split
    assert found.counts.keys() == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_sp_forward_passes_keys_and_values_on(family: str) -> None:
    found = program(family, SP, "forward")
    attentions = 3 if family == "t5" else 1  # of the encoder, of the decoder, and between them
    assert found.counts == {"collective-permute": 2 * attentions * found.layers}  # in loops, which count once


def test_sp_gathers_keys_and_values_where_no_ring_is_wanted() -> None:
    found = program("llama", SP, "forward", fields=(("attn_mechanism", "vanilla"),))
    assert found.counts == {"all-gather": 2 * found.layers}


SCAN = (("scan_layers", True),)


@pytest.mark.parametrize("fields", [(), pytest.param(SCAN, marks=pytest.mark.slow)], ids=["list", "scan"])
def test_an_sp_step_passes_on_what_it_needs_and_labels(fields: tuple) -> None:
    """Forward, keys and values; backward, those once more with their gradients, and these on their last way home."""
    found = program("llama", SP, "step", fields=fields)
    assert found.counts.keys() == {"collective-permute", "all-reduce", "all-to-all"}
    rings = 1 if fields else found.layers
    permuted = Counter("s32[" in type_ for type_ in found.types["collective-permute"])
    assert permuted[False] == 8 * rings
    # Labels are shifted by a place, which is another device's at each border: integers, not activations.
    assert permuted[True] <= 1
    assert all("s32[" in type_ and "f32[" not in type_ for type_ in found.types["all-to-all"])


def test_one_prompt_moves_no_weights() -> None:
    """Where there is one row, fsdp splits no batch: products are summed, and what is gathered are activations."""
    found = program("llama", FSDP, "forward", batch=1)
    largest = max(
        int(size) for type_ in found.types["all-gather"] for size in re.findall(r"\[(?:1,)?16,(\d+)\]", type_)
    )
    assert all(re.fullmatch(r"f32\[(1,)?16,\d+\]\{.*\}", type_) for type_ in found.types["all-gather"])
    assert largest <= 96, "hidden states or logits"


def cells(family: str, dims: tuple, fields: tuple) -> list[str]:
    counted = [program(family, dims, what, fields=fields).counts for what in ("forward", "step")]
    return [", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none" for counts in counted]


# Of what the others send the tests above, or those of plans, count the most.
QUICK = ("`fsdp=8`", "`sp=4`", "`fsdp=2, ep=2, tp=2`")


@pytest.mark.parametrize(
    ("mesh", "family", "dims", "fields"),
    [pytest.param(*row, marks=[] if row[0] in QUICK else pytest.mark.slow) for row in TABLE],
    ids=[row[0].strip("`") for row in TABLE],
)
def test_the_document_says_what_is_counted(mesh: str, family: str, dims: tuple, fields: tuple) -> None:
    row = f"| {mesh} | {family} | {' | '.join(cells(family, dims, fields))} |"
    assert row in DOCUMENT.read_text(encoding="utf-8"), f"docs/sharding.md lacks:\n{row}"

"""What is sent: XLA's text read line by line, and against what the partition rules ask for."""

from __future__ import annotations

import functools

import pytest

from easydel import LlamaConfig, plan_training
from easydel.planning.collectives import collective_bytes
from easydel.sharding import abstract_mesh

MESH = abstract_mesh({"fsdp": 4, "tp": 2})
TEXT = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %all-gather.1 = f32[64,16]{1,0} all-gather(%x), channel_id=1, replica_groups=GROUPS, dimensions={0}
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.2 = (f32[64]{0}, bf16[2,3]{1,0}) all-reduce(%b, %c), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %collective-permute.3 = s8[5]{0} collective-permute(%d), source_target_pairs={{0,2},{2,4}}
  %ag-start = (f32[2]{0}, f32[8]{0}) all-gather-start(%e), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %ag-done = f32[8]{0} all-gather-done(%ag-start)
  %fusion = f32[9]{0} fusion(%all-reduce.2), kind=kLoop, calls=%fused
}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", "fsdp"),
        ("[2,4]<=[4,2]T(1,0)", "fsdp"),
        ("[4,2]<=[8]", "tp"),
        ("[1,8]<=[8]", "fsdp+tp"),
        ("{}", "fsdp+tp"),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "fsdp"),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "tp"),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", "tp"),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", "fsdp"),
    ],
)
def test_collectives_are_read_wherever_they_stand(groups, axes):
    found = collective_bytes(TEXT.replace("GROUPS", groups), MESH)
    assert found == {
        ("all_gather", axes): 3 * 64 * 16 * 4 + (8 * 4 if axes == "fsdp" else 0),
        ("all_reduce", "tp"): 64 * 4 + 6 * 2,
        ("collective_permute", "fsdp"): 5,
        **({} if axes == "fsdp" else {("all_gather", "fsdp"): 8 * 4}),
    }


SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_mechanism": "vanilla",
    "scan_layers": True,
}
LAYER = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
TABLE = 4 * 512 * 64
ROWS, LENGTH = 8, 32


@functools.cache
def planned(axes):
    return plan_training(LlamaConfig(**SHAPE), axes, batch_size=ROWS, sequence_length=LENGTH, policies=())


@pytest.mark.parametrize(("axes", "tp", "tables"), [("fsdp=4", 1, 2), ("fsdp=4,tp=2", 2, 2)])
def test_parameters_are_gathered_forward_and_backward_and_gradients_summed_once(axes, tp, tables):
    """To the byte, but for norms and scalars in the sums (1%): they are summed too, and they are small.

    The embedding is looked up once, and its gradient needs no table. The head, in no scan, stays gathered until
    backward.
    """
    plan = planned(axes)
    gathered, summed = (plan.collective_bytes_per_step[kind]["fsdp"] for kind in ("all_gather", "all_reduce"))
    assert gathered == (3 * 2 * LAYER + tables * TABLE) // tp
    assert summed == pytest.approx((3 * LAYER + 2 * TABLE) / tp, rel=0.01)


def test_activations_are_summed_over_tp_four_times_a_layer():
    """Two forward, two backward; the lookup and the head's gradient add one each, softmax a few numbers a token."""
    plan = planned("fsdp=4,tp=2")
    tokens = ROWS // 4 * LENGTH
    hidden, products = 4 * tokens * 64, 4 * 3 + 2
    # Backward XLA sums the parts of q, k and v, and of gate and up, one by one on CPUs: 5 in place of 2.
    assert plan.collective_bytes_per_step["all_reduce"]["tp"] == pytest.approx((products + 3 * 3) * hidden, rel=0.02)


def test_one_device_sends_nothing_and_dp_only_gradients():
    assert planned("dp=1").collective_bytes_per_step == {}
    plan = planned("dp=4")
    assert plan.collective_bytes_per_step.keys() == {"all_reduce"}
    assert plan.collective_bytes_per_step["all_reduce"]["dp"] == pytest.approx(4 * plan.parameters, rel=0.001)

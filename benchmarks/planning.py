"""Plans of random models on random meshes against the memory XLA lays out for the training loop's own step.

    python -m benchmarks.planning --cases 40 --seed 7

The models are the tiny ones of the tests made wider, longer and deeper; eight CPU devices are simulated.
"""

from __future__ import annotations

import argparse
import os
import random
from typing import Any

MESHES: tuple[dict[str, int], ...] = (
    {}, {"fsdp": 8}, {"fsdp": 4, "tp": 2}, {"dp": 2, "fsdp": 2, "tp": 2}, {"tp": 4, "fsdp": 2}, {"sp": 2, "fsdp": 4},
    {"dp": 8}, {"ep": 2, "fsdp": 4}, {"ep": 2, "tp": 2, "fsdp": 2},
)  # fmt: skip
WIDTHS = ("hidden_size", "intermediate_size", "d_model", "d_ff", "n_embd", "head_dim", "d_kv")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer")


def draw(dice: random.Random) -> tuple[str, Any, Any, dict[str, int], int, int]:
    """Draw a family, its class and config, a mesh, a batch size and a sequence length."""
    import easydel
    from tests.models.table import FAMILIES

    family = dice.choice(sorted(FAMILIES))
    row = FAMILIES[family]
    cls = getattr(easydel, row.class_name(row.main_task, "ours"))
    fields = {**row.config, **row.main.config}
    wider = dice.choice([1, 2, 4, 8])
    fields |= {name: fields[name] * wider for name in WIDTHS if fields.get(name)}
    fields["vocab_size"] *= dice.choice([1, 8])
    fields |= {name: 1024 for name in ("max_position_embeddings", "n_positions") if name in fields}
    depth = dice.choice([1, 2, 3, 5])
    fields |= {name: depth for name in DEPTHS if name in fields and "layer_types" not in fields}
    remat, scan = dice.choice(["none", "full", "dots", "dots_no_batch"]), dice.random() < 0.4
    axes = dice.choice(MESHES if family == "mixtral" else MESHES[:7])
    rows, length = 8 * dice.choice([1, 2]), dice.choice([32, 64, 256])
    config = cls.config_class(**fields, gradient_checkpointing=remat, scan_layers=scan)
    return family, cls, config, axes, rows, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from easydel import plan_training
    from tests.planning.compiled import bytes_of, compiled_step, mesh_of

    dice, differences = random.Random(options.seed), []
    for _ in range(options.cases):
        family, cls, config, axes, rows, length = draw(dice)
        shapes = dict.fromkeys(("input_ids", "labels"), (rows, length))
        laid_out = bytes_of(compiled_step(cls, config, mesh_of(**axes), shapes))
        plan = plan_training(cls, axes, config, batch_size=rows, sequence_length=length, policies=())
        differences.append(abs(plan.total_bytes_per_device / laid_out - 1))
        scan = "scan" if config.scan_layers else "list"
        print(
            f"{differences[-1]:7.2%}  {laid_out:>12,}  {family} {axes} {plan.remat} {scan} {rows}x{length}", flush=True
        )
    print(f"{len(differences)} cases: largest {max(differences):.2%}, mean {sum(differences) / len(differences):.2%}")


if __name__ == "__main__":
    main()

"""Meshes over a fast and a slow network: which device stands where."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from easydel import LlamaConfig
from easydel.errors import ShardingError
from easydel.sharding import create_mesh
from easydel.sharding.hybrid import check_dims, dims_over_groups, order_devices

NAMES = ("dp", "fsdp", "ep", "tp", "sp")


@dataclass(frozen=True)
class Device:
    """A device of another machine."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "some"


def devices_of(groups: int, each: int) -> list[Device]:
    return [Device(group * each + place, group) for group in range(groups) for place in range(each)]


@pytest.mark.parametrize(
    ("dims", "groups", "expected"),
    [
        ((1, 8, 1, 1, 1), 2, (1, 2, 1, 1, 1)),
        ((4, 2, 1, 1, 1), 2, (2, 1, 1, 1, 1)),
        ((2, 4, 1, 2, 1), 4, (2, 2, 1, 1, 1)),
        ((1, 1, 1, 8, 1), 2, (1, 1, 1, 2, 1)),
        ((2, 3, 1, 1, 1), 3, (1, 3, 1, 1, 1)),
        ((1, 8, 1, 1, 1), 3, None),
    ],
)
def test_the_slow_axes_go_from_group_to_group(dims, groups, expected):
    assert dims_over_groups(dims, groups) == expected


@pytest.mark.parametrize(
    ("dims", "over"),
    [((2, 4, 1, 1, 1), (2, 1, 1, 1, 1)), ((2, 4, 1, 1, 1), (1, 2, 1, 1, 1)), ((2, 2, 1, 2, 1), (1, 1, 1, 2, 1))],
)
def test_a_group_is_a_box(dims, over):
    """Along an axis that stays inside, all devices are of one group, along another of as many as it goes over."""
    order = order_devices(devices_of(2, 4), dims, over)
    assert order.shape == dims
    assert sorted(device.id for device in order.flat) == list(range(8))
    groups = np.vectorize(lambda device: device.process_index)(order)
    for axis, count in enumerate(over):
        lines = np.moveaxis(groups, axis, -1).reshape(-1, dims[axis])
        assert {len(set(line)) for line in lines.tolist()} == {count}


def test_a_single_group_has_the_usual_order():
    assert (create_mesh((2, 2, 1, 2, 1)).devices == create_mesh((2, 2, 1, 2, 1), dcn_axis_dims=(1,) * 5).devices).all()
    mesh = create_mesh((2, 2, 1, 2, 1), devices=jax.devices()[::-1])
    assert mesh.devices.reshape(-1).tolist() == jax.devices()[::-1]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ((2, 1, 1, 1), "give a positive number for each of the axes"),
        ((0, 1, 1, 1, 1), "give a positive number"),
        ((-1, -1, 1, 1, 1), "at most one may be -1"),
        ((2, 2, 1, 1, 1), "there are 2 groups of devices"),
        ((1, 1, 2, 1, 1), "does not divide ep=1 by 2"),
    ],
)
def test_what_does_not_fit_is_refused(over, message):
    with pytest.raises(ShardingError, match=message):
        check_dims(over, (2, 4, 1, 1, 1), NAMES, 2)


def test_one_may_be_inferred():
    found = check_dims((1, -1, 1, 1, 1), (2, 4, 1, 1, 1), NAMES, 2)
    assert found == (1, 2, 1, 1, 1)
    assert math.prod(found) == 2


def test_the_config_hands_it_on():
    config = LlamaConfig(sharding_axis_dims=(2, -1, 1, 1, 1), sharding_dcn_axis_dims=(2, 1, 1, 1, 1))
    with pytest.raises(ShardingError, match="there are 1 groups of devices"):
        _ = config.mesh
    assert "sharding_dcn_axis_dims" not in config.to_dict()

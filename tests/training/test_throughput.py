"""Speed by a clock that is told the time, and the peaks of devices by the names JAX gives them."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest
from jax._src.pallas.mosaic.tpu_info import chip_version_from_device_kind

from easydel.training import throughput
from easydel.training.throughput import Meter, memory_in_use, peak_flops


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    return now


def test_a_rate_is_tokens_by_the_seconds_since_the_last_reading(clock, monkeypatch):
    monkeypatch.setattr(throughput, "memory_in_use", lambda: 7)
    monkeypatch.setattr(Meter, "peak", 1e6)
    meter = Meter(flops_per_token=50.0)
    meter.add(1000)
    clock.seconds += 2
    meter.add(3000)
    clock.seconds += 2
    assert meter.read() == {"tokens_per_second": 1000.0, "mfu": 0.05, "memory_bytes": 7}
    meter.add(500)
    clock.seconds += 1
    assert meter.read()["tokens_per_second"] == 500.0
    meter.add(500)
    clock.seconds += 30
    meter.restart()  # compiling, say
    clock.seconds += 1
    meter.add(250)
    assert meter.read()["tokens_per_second"] == 250.0


def test_measuring_the_peak_is_not_counted_as_training(clock, monkeypatch):
    def slow():
        clock.seconds += 60
        return 1e9

    monkeypatch.setattr(throughput, "peak_flops", slow)
    meter = Meter(1.0)
    for _ in range(2):
        meter.add(100)
        clock.seconds += 1
        assert meter.read()["tokens_per_second"] == 100.0


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("TPU v2", 23e12),
        ("TPU v3", 61.5e12),
        ("TPU v4", 275e12),
        ("TPU v4 lite", 138e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153e12),
    ],
)
def test_peaks_by_name(kind, flops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == flops
    if kind.startswith("TPU"):  # JAX's own names
        assert chip_version_from_device_kind(kind) is not None


def test_other_devices_are_measured():
    device = SimpleNamespace(device_kind="NVIDIA T400")
    with pytest.raises(Exception, match="SimpleNamespace"):  # no peak of a T4: it went on to measure
        peak_flops(device)
    assert 1e8 < peak_flops(jax.devices()[0]) < 1e14


def test_memory(monkeypatch):
    assert 10e6 < memory_in_use() < 1e12  # of this process, on a CPU
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (3, 5)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_in_use() == 5


@pytest.mark.parametrize(("platform", "count"), [("cpu", 1), ("gpu", 8)])
def test_simulated_devices_share_a_peak(monkeypatch, platform, count):
    monkeypatch.setattr(throughput, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform=platform)])
    assert Meter(1.0).peak == 1e9 * count

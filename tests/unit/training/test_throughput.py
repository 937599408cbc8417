"""Peaks, rates and the clock that stands still between steps."""

import pytest

from megatron_metro.training.throughput import StepTimer, format_duration, peak_tflops, tflops_per_device


@pytest.mark.parametrize(
    ("name", "half", "override", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", True, None, 989.4),
        ("NVIDIA H200", True, None, 989.4),
        ("NVIDIA A100-SXM4-80GB", True, None, 312.0),
        ("NVIDIA H200", False, None, None),
        ("Some other card", True, None, None),
        (None, False, None, None),
        (None, False, 0.2, 0.2),
        ("NVIDIA H200", True, 800.0, 800.0),
    ],
)
def test_peaks(name, half, override, expected):
    assert peak_tflops(name, is_half_precision=half, override=override) == expected


def test_rate_is_per_device():
    assert tflops_per_device(8e12, seconds=2.0, num_devices=4) == 1.0


def test_timer_counts_steps_only():
    now = [0.0]
    waits = []
    timer = StepTimer(lambda: waits.append(now[0]), clock=lambda: now[0])
    timer.start()
    now[0] = 3.0
    timer.stop()
    now[0] = 10.0  # an evaluation
    timer.start()
    timer.start()
    now[0] = 12.0
    assert timer.lap() == 5.0
    now[0] = 13.0
    assert timer.lap() == 1.0
    timer.stop()
    assert timer.lap() == 0.0
    assert waits == [0.0, 3.0, 10.0, 12.0, 12.0, 13.0, 13.0, 13.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (61, "0:01:01"), (3723, "1:02:03"), (2 * 86400 + 3723, "2 d 01:02:03")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text

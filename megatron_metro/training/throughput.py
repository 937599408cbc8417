"""Speed of a run: seconds per step without evaluation and saving, TFLOP/s per device, share of the device's peak."""

import time
from collections.abc import Callable

# Dense BF16 tensor-core peaks in TFLOP/s (NVIDIA's data sheets, without sparsity), by part of the device's name: the
# first that fits.
_PEAK_TFLOPS = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4}


def peak_tflops(device_name: str | None, *, is_half_precision: bool, override: float | None) -> float | None:
    """The peak that MFU is a share of, or None where it is not known.

    `device_name` is torch.cuda.get_device_name(), None on a CPU. The table holds BF16 peaks, so a run in FP32 and a CPU
    have one only when `override` (--peak-tflops) names it.
    """
    if override is not None:
        return override
    if device_name is None or not is_half_precision:
        return None
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


def tflops_per_device(step_flops: float, seconds: float, num_devices: int) -> float:
    """Achieved TFLOP/s of one device, from the minimal floating-point operations of a whole step."""
    return step_flops / seconds / num_devices / 1e12


class StepTimer:
    """Time spent in training steps; stands still between `stop` and `start` (evaluation, saving).

    `synchronize` waits for the device, so that queued work is counted where it was asked for.
    """

    def __init__(self, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize, self._clock = synchronize, clock
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Run on; does nothing while running."""
        if self._started is None:
            self._synchronize()
            self._started = self._clock()

    def stop(self) -> None:
        """Stand still; does nothing while standing."""
        if self._started is not None:
            self._synchronize()
            self._seconds += self._clock() - self._started
            self._started = None

    def lap(self) -> float:
        """Seconds counted since the last lap; the clock goes on as it did."""
        was_running = self._started is not None
        self.stop()
        seconds, self._seconds = self._seconds, 0.0
        if was_running:
            self.start()
        return seconds


def format_duration(seconds: float) -> str:
    """`1:02:03`, or `2 d 01:02:03` from a day on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02}:{minutes:02}:{rest:02}" if days else f"{hours}:{minutes:02}:{rest:02}"

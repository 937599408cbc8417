"""What surrounds a run on each rank: signals, watchdog, status file, and the way out when anything goes wrong."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from megatron_metro.config.errors import MetroError, OutOfMemoryError, StoppedError, StorageError, first_line
from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.agreement import gather_on_all
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.side_channel import is_connection_error
from megatron_metro.training.status import CAUSES, LAST_PHASE, Progress, StatusFile
from megatron_metro.training.stopping import StopRequest
from megatron_metro.training.watchdog import LEAST_SAMPLES, Watchdog, find_slow, leave_at_once

_NO_HOST_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class Supervisor:
    """One rank's; inert until `supervise` starts it. A job of one process has nobody to watch."""

    def __init__(self, run: RunConfig, groups: ParallelGroups) -> None:
        self.progress = Progress()
        self.status = StatusFile(run.checkpoint.save, groups.rank, self.progress)
        self.stop_request = StopRequest(run.training.exit_duration_in_mins, self._end_at_once)
        self._run, self._groups = run, groups
        self._watchdog = Watchdog(groups, self.progress, self.status) if groups.world_size > 1 else None
        self._known_slow: list[int] = []

    def start(self) -> None:
        """Collective."""
        if self._run.training.exit_signal_handler:
            self.stop_request.install()
        self.status.write("running", None)
        if self._watchdog is not None:
            self._watchdog.limit_seconds = 60.0 * self._run.parallel.distributed_timeout_minutes
            self._watchdog.start()

    def step_is_done(self, step: int) -> None:
        """After every optimizer step: from the first one on a hang is noticed sooner."""
        self.progress.step = step
        seconds = self._run.parallel.distributed_timeout_seconds_after_init
        if self._watchdog is not None and seconds is not None:
            self._watchdog.limit_seconds = seconds

    def agree_on_stop(self) -> str | None:
        """The signal that makes all ranks stop, or None if it is their time that is over. Collective."""
        names = [name for name in gather_on_all(self.stop_request.signal_name) if name is not None]
        why = names[0] if names else "--exit-duration-in-mins"
        # What stands there if the process is killed before it has saved.
        text = (
            f"{why} at iteration {self.progress.step}: saving; if this is the last word, the time between signal and "
            "kill was too short to save (torchrun --shutdown-timeout, sbatch --signal, terminationGracePeriodSeconds)"
        )
        self.status.write("stopping", None, text)
        return names[0] if names else None

    def find_slow_ranks(self) -> list[int]:
        """Ranks that the others have waited for lately and that were not named before. Collective."""
        if self._watchdog is None:
            return []
        samples = gather_on_all(self._watchdog.take_samples())
        if min(total for total, _ in samples) < LEAST_SAMPLES:
            return []
        self._watchdog.forget_samples()
        slow = find_slow(samples)
        unknown = [rank for rank in slow if rank not in self._known_slow]
        self._known_slow = slow
        return unknown

    def finish(self) -> None:
        """Everything is done: wait for the others, who are told that this rank may go. Collective."""
        self.progress.enter(LAST_PHASE)
        gather_on_all(None)
        self._close()
        self.status.write("done", 0)

    def fail(self, error: BaseException) -> BaseException:
        """Write and tell why this rank ends; returns what to raise. Ends the process if another rank is the reason."""
        self.progress.is_leaving = True
        if self._watchdog is not None and (is_connection_error(error) or is_connection_error(error.__cause__)):
            self._watchdog.end(self._watchdog.explain(error))
        ended = translate(error, self._run, self.progress)
        exit_code = _exit_code(ended)
        text = str(ended) if isinstance(ended, MetroError) else first_line(ended)
        with suppress(StorageError):
            self.status.write(CAUSES.get(exit_code, "interrupted"), exit_code, " ".join(text.split()))
        if self._watchdog is not None:
            self._watchdog.exit_code = exit_code
            self._watchdog.announce(f"rank {self._groups.rank} ended with exit code {exit_code}: {text}")
        self.stop_request.restore()
        return ended

    def _close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        self.stop_request.restore()

    def _end_at_once(self, name: str, number: int) -> None:
        text = f"a second {name}: ended at once; what was saved before stays as it was"
        with suppress(StorageError):
            self.status.write("interrupted", 128 + number, text)
        leave_at_once(text, 128 + number)


@contextmanager
def supervise(run: RunConfig, groups: ParallelGroups) -> Iterator[Supervisor]:
    """Watch over the body on all ranks. What it raises on one rank ends all: this one with its error, others with 78.

    Raises MetroErrors; any other error of the body passes as it is, a SystemExit as one that is no success.
    """
    supervisor = Supervisor(run, groups)
    try:
        supervisor.start()
        yield supervisor
        supervisor.finish()
    except BaseException as error:
        ended = supervisor.fail(error)
        if ended is error:
            raise
        raise ended from None


def translate(error: BaseException, run: RunConfig, progress: Progress) -> BaseException:
    """An error as a user can act on it; a fault of ours stays as it is."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else MetroError.exit_code
        return SystemExit(code)
    if isinstance(error, MetroError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"out of memory after iteration {progress.step}, phase {progress.phase} ({first_line(error)}); "
            f"{_list_savings(run)}"
        )
    if isinstance(error, OSError):
        return StorageError(f"after iteration {progress.step}, phase {progress.phase}: {first_line(error)}")
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_HOST_MEMORY)


def _list_savings(run: RunConfig) -> str:
    """The flags that lower memory and are not yet at their end, with what they are now."""
    parallel, optimizer, size = run.parallel, run.optimizer, run.training.micro_batch_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    savings = [
        f"lower --micro-batch-size {size}" if size > 1 else "",
        "" if parallel.recompute_granularity == "full" else "give --recompute-granularity full",
        "" if optimizer.bf16 or optimizer.fp16 else "give --bf16",
        "" if parallel.use_distributed_optimizer or optimizer.optimizer != "adam" else "--use-distributed-optimizer",
        f"raise --tensor-model-parallel-size {tp} or --pipeline-model-parallel-size {pp}",
        f"lower --encoder-seq-length {run.data.encoder_seq_length}",
    ]
    return ", or ".join(saving for saving in savings if saving)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, MetroError) else MetroError.exit_code


def stopped_by(signal_name: str, saved_to: str | None, step: int) -> StoppedError:
    """How a run that a signal has stopped ends."""
    if saved_to is None:
        text = f"{signal_name} has stopped the run after iteration {step}; nothing is saved, since there is no --save"
        return StoppedError(text, 128 + signal.Signals[signal_name])
    return StoppedError(f"{signal_name} has stopped the run; iteration {step} is saved, go on with --load {saved_to}")

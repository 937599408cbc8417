"""The microbatches of one data-parallel rank, step after step; the whole state is the number of consumed samples.

Global sample i of a run is the same block whatever the layout: microbatch j of rank r takes samples
consumed + (j x dp_size + r) x micro_batch_size onwards.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_metro.batch import Microbatch
from megatron_metro.config.batches import count_completed_steps
from megatron_metro.config.curriculum import MASKING_RATES, find_schedules
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.mixture import Mixture, Part, TextFacts, build_mixture
from megatron_metro.data.objectives import Objective, build_objective
from megatron_metro.data.workers import WorkerPool
from megatron_metro.tokenizer import Tokenizer

# Blocks read at once where a step has fewer: what a call costs whatever its size is then shared by many blocks.
READ_AHEAD_BLOCKS = 64

StepRequest = tuple[int, int]  # consumed samples, number of microbatches
StepArrays = dict[str, NDArray]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReader:
    """Reads any step of one rank: a pure function of the request."""

    mixture: Mixture
    objective: Objective
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    objective_at: Callable[[int], Objective] | None = None  # by consumed samples, where masking rates are scheduled

    def read(self, request: StepRequest) -> StepArrays:
        """The fields of all microbatches of a step, one after the other along the first dimension."""
        consumed, num_microbatches = request
        first = consumed + (np.arange(num_microbatches) * self.dp_size + self.dp_rank) * self.micro_batch_size
        samples = (first[:, None] + np.arange(self.micro_batch_size)).ravel()
        objective = self.objective
        if self.objective_at is not None:
            objective = self.objective_at(consumed)
        batch = objective.make_batch(self.mixture.read(samples))
        values = ((field.name, getattr(batch, field.name)) for field in fields(Microbatch))
        return {name: value.numpy() for name, value in values if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSpec:
    """All a process needs to read the steps of one rank; small enough to send to a worker."""

    config: RunConfig
    facts: TextFacts
    part: Part
    dp_rank: int
    dp_size: int

    def open(self) -> StepReader | None:
        """Open the files; None when the part has no documents."""
        objective = build_objective(self.config, self.facts.vocabulary)
        is_scheduled = any(name in MASKING_RATES for name in find_schedules(self.config.objective))
        mixture = build_mixture(self.config, self.facts, objective, self.part)
        if mixture is None:
            return None
        return StepReader(
            mixture=mixture,
            objective=objective,
            micro_batch_size=self.config.training.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            objective_at=self._objective_at if is_scheduled and self.part == "train" else None,
        )

    def _objective_at(self, consumed_samples: int) -> Objective:
        """The objective at the scheduled masking rates; validation has no schedule."""
        step = count_completed_steps(self.config.training, consumed_samples)
        return build_objective(self.config, self.facts.vocabulary, step)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenReader:
    """What a worker calls to start: opens the files of a specification."""

    spec: LoaderSpec

    def __call__(self) -> Callable[[StepRequest], StepArrays]:
        torch.set_num_threads(1)
        reader = self.spec.open()
        assert reader is not None, "the parent opened the same files"
        return reader.read


class StepLoader:
    """Hands out the microbatches of each step.

    With workers, the following steps are prepared meanwhile; without, small steps are read several at once.
    """

    def __init__(self, reader: StepReader, spec: LoaderSpec, num_workers: int) -> None:
        self.consumed_samples = 0
        self.mixture = reader.mixture
        self.objective = reader.objective
        self._reader = reader
        self._ahead: deque[Microbatch] = deque()  # read already, the first of them after `_ahead_from` samples
        self._ahead_from = 0
        self._pending: deque[tuple[StepRequest, int]] = deque()  # request and the worker that has it
        self._num_workers = num_workers
        self._open = OpenReader(spec=spec)
        self._pool: WorkerPool[StepRequest, StepArrays] | None = None

    def next_step(self, num_microbatches: int) -> list[Microbatch]:
        """The microbatches of the next step; samples of all data-parallel ranks count as consumed."""
        if self._num_workers and self._pool is None:  # not before: the loaders of later stages have to wait
            self._pool = WorkerPool(self._open, self._num_workers, "data", "spawn")
        request = (self.consumed_samples, num_microbatches)
        if self._pool is None:
            microbatches = self._read(num_microbatches)
        else:
            microbatches = _split(self._fetch(self._pool, request), num_microbatches)
        self.consumed_samples += self._count_samples(num_microbatches)
        return microbatches

    def rewind(self, consumed_samples: int) -> None:
        """Continue after so many consumed samples, as a resumed run and every validation do."""
        self.consumed_samples = consumed_samples

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _read(self, num_microbatches: int) -> list[Microbatch]:
        """The next microbatches, of a step or of several: which they are does not depend on how they are read."""
        if self._ahead_from != self.consumed_samples:
            self._ahead.clear()
        missing = num_microbatches - len(self._ahead)
        if missing > 0:
            # Steps of a schedule differ in their masking rate.
            num_ahead = 0 if self._reader.objective_at else READ_AHEAD_BLOCKS // self._reader.micro_batch_size
            num_read = max(missing, num_ahead)
            first = self.consumed_samples + self._count_samples(len(self._ahead))
            self._ahead += _split(self._reader.read((first, num_read)), num_read)
        self._ahead_from = self.consumed_samples + self._count_samples(num_microbatches)
        return [self._ahead.popleft() for _ in range(num_microbatches)]

    def _fetch(self, pool: WorkerPool[StepRequest, StepArrays], request: StepRequest) -> StepArrays:
        # Steps are prepared in the belief that their number of microbatches stays. After a rewind or a ramp-up of the
        # batch the belief was wrong: what was prepared is thrown away, never used.
        if not self._pending or self._pending[0][0] != request:
            for _, worker in self._pending:
                pool.result(worker)
            self._pending.clear()
            consumed, num_microbatches = request
            for worker in range(len(pool)):
                self._submit(
                    pool, worker, (consumed + worker * self._count_samples(num_microbatches), num_microbatches)
                )
        _, worker = self._pending.popleft()
        arrays = pool.result(worker)
        (last, num_microbatches), _ = self._pending[-1] if self._pending else (request, worker)
        self._submit(pool, worker, (last + self._count_samples(num_microbatches), num_microbatches))
        return arrays

    def _submit(self, pool: WorkerPool[StepRequest, StepArrays], worker: int, request: StepRequest) -> None:
        pool.submit(worker, request)
        self._pending.append((request, worker))

    def _count_samples(self, num_microbatches: int) -> int:
        return num_microbatches * self._reader.micro_batch_size * self._reader.dp_size


def build_loaders(
    config: RunConfig, tokenizer: Tokenizer, dp_rank: int, dp_size: int
) -> tuple[StepLoader, StepLoader | None]:
    """(training, validation) loaders; validation is None when --eval-iters is 0 or its share of --split is.

    Opens and checks all files, so call it before process groups start; the loaders may be used in any process.
    Without --num-workers there are none.
    """
    train = _build_loader(config, tokenizer, "train", dp_rank, dp_size)
    assert train is not None
    valid = _build_loader(config, tokenizer, "valid", dp_rank, dp_size) if config.training.eval_iters else None
    return train, valid


def _build_loader(config: RunConfig, tokenizer: Tokenizer, part: Part, dp_rank: int, dp_size: int) -> StepLoader | None:
    facts = TextFacts(vocabulary=tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256)
    spec = LoaderSpec(config=config, facts=facts, part=part, dp_rank=dp_rank, dp_size=dp_size)
    reader = spec.open()
    # Validation is rare and short: its batches are made on the spot.
    num_workers = config.data.num_workers or 0 if part == "train" else 0
    return None if reader is None else StepLoader(reader, spec, num_workers)


def _split(arrays: StepArrays, num_microbatches: int) -> list[Microbatch]:
    tensors = {name: torch.from_numpy(array).chunk(num_microbatches) for name, array in arrays.items()}
    return [Microbatch(**{name: parts[i] for name, parts in tensors.items()}) for i in range(num_microbatches)]

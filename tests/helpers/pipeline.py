"""Engines cut in any way, for the tests of the pipeline itself: messages, memory, order of the schedule, precision."""

import random
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import build_chain
from megatron_metro.config.schema import ModelConfig
from megatron_metro.device import activate
from megatron_metro.parallel import vocab_ops
from megatron_metro.parallel.groups import reinitialise
from megatron_metro.parallel.layout import StageLayout, parse, single_piece
from megatron_metro.training.engine import Engine
from megatron_metro.training.optimizer import set_learning_rate
from tests.helpers import tiny
from tests.helpers.mutations import replaced_attribute
from tests.helpers.parity import Arrays, Case, _gather, _parameters, local_microbatches, perturb

FIRST_FILL = 4  # ids below are special tokens

_unclosed: list[weakref.ref[Engine]] = []


def build_engine(case: Case, scale: float = 0.05) -> Engine:
    """This rank's engine of a case, its weights moved by N(0, scale) where that is not 0; collective.

    Closes the engine built before it: what ties an unclosed one together passes through autograd's own nodes, which
    Python cannot collect, and its process groups would live on with dozens of threads.
    """
    while _unclosed:
        if (former := _unclosed.pop()()) is not None:
            former.close()
    parallel = case.run.parallel
    groups = reinitialise(parallel)
    activate("cpu").seed_all(1, tp_rank=groups.tp_rank)
    chain = build_chain(case.run.model)
    layout = single_piece(chain)
    if parallel.pipeline_model_parallel_size > 1:
        assert case.layout is not None, "cut by hand, evenly or at random"
        layout = parse(
            case.layout, chain, parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
        )
    engine = Engine(case.run, layout, groups, case.dtype, pad_id=tiny.PAD_ID)
    if scale:
        perturb(engine, scale)
    set_learning_rate(engine.optimizer, case.run.optimizer.lr)
    _unclosed.append(weakref.ref(engine))
    return engine


def microbatches_of(engine: Engine, case: Case, step: int = 0) -> list[Microbatch]:
    """This rank's microbatches of a step."""
    return local_microbatches(case, step, engine.groups.dp_rank, engine.groups.dp_size)


def even_cut(model: ModelConfig, num_pieces: int) -> str:
    """The chain in pieces of as equal numbers of units as can be."""
    num_units = len(build_chain(model))
    return _cut(model, [round(i * num_units / num_pieces) for i in range(1, num_pieces)])


def random_cut(rng: random.Random, model: ModelConfig, num_pieces: int) -> str:
    """Any cut of the chain into non-empty pieces, all equally likely."""
    return _cut(model, sorted(rng.sample(range(1, len(build_chain(model))), num_pieces - 1)))


def _cut(model: ModelConfig, cuts: list[int]) -> str:
    chain = build_chain(model)
    bounds = [0, *cuts, len(chain)]
    pieces = tuple(chain[start:end] for start, end in pairwise(bounds))
    return StageLayout(pieces=pieces, pp_size=len(pieces)).format()


def fill_from_uniforms(logits: Tensor, uniforms: Tensor, *_: Any) -> Tensor:
    """Stands in for the sampler where rounding would move a draw over the edge between two tokens: no logits read."""
    return (FIRST_FILL + uniforms * (tiny.VOCAB_SIZE - FIRST_FILL)).long()


def fixed_fills() -> AbstractContextManager[None]:
    """The generator's fills as a function of the uniforms alone."""
    return replaced_attribute(vocab_ops, "sample", fill_from_uniforms)


def gather_gradient_shards(engine: Engine) -> None:
    """Undo the reduce-scatter of the distributed optimizer: `main_grad` of every weight is whole on every rank."""
    if not engine.run.parallel.use_distributed_optimizer:
        return
    groups = engine.groups
    for chunk in engine.chunks:
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            shards = list(bucket.grad_data.chunk(groups.dp_size))
            dist.all_gather(shards, shards[groups.dp_rank].clone(), group=groups.dp_group)


def whole_gradients(engine: Engine) -> Arrays:
    """The whole model's gradients by name, without the loss scale, from `main_grad` as the step left it; collective."""
    gather_gradient_shards(engine)
    scale = engine.optimizer.get_loss_scale().item()
    return _gather(engine, {name: p.main_grad.double() / scale for name, p in _parameters(engine).items()})


@dataclass(frozen=True, slots=True)
class Event:
    """One forward or backward pass of one microbatch through one chunk; seconds of the machine's monotonic clock."""

    kind: Literal["forward", "backward"]
    start: float
    end: float


@contextmanager
def recording_schedule(forward_seconds: float = 0.0, backward_seconds: float = 0.0) -> Iterator[list[Event]]:
    """What the schedules do on this rank, in order; each pass is stretched to at least the given time by sleeping."""
    events: list[Event] = []

    def paced(kind: Literal["forward", "backward"], seconds: float) -> Callable[..., Any]:
        original = getattr(schedules, f"{kind}_step")

        def run(*arguments: Any, **options: Any) -> Any:
            start = time.monotonic()
            result = original(*arguments, **options)
            time.sleep(max(0.0, start + seconds - time.monotonic()))
            events.append(Event(kind, start, time.monotonic()))
            return result

        return run

    with (
        replaced_attribute(schedules, "forward_step", paced("forward", forward_seconds)),
        replaced_attribute(schedules, "backward_step", paced("backward", backward_seconds)),
    ):
        yield events


def passes_in_flight(events: list[Event]) -> list[int]:
    """After each event, how many forward passes still wait for their backward."""
    counts, count = [], 0
    for event in events:
        count += 1 if event.kind == "forward" else -1
        counts.append(count)
    return counts


def idle_share(timelines: list[list[Event]]) -> float:
    """Share of the ranks' time, from the first pass of any to the last pass of any, that is in no pass."""
    events = [event for timeline in timelines for event in timeline]
    span = max(event.end for event in events) - min(event.start for event in events)
    return 1.0 - sum(event.end - event.start for event in events) / (len(timelines) * span)


class SavedBytes:
    """Bytes that autograd holds for backward passes while entered: live storages, each counted once.

    `ignored` are tensors that live anyway, as weights and input data. Not counted is what an operation keeps outside
    autograd's saved tensors.
    """

    def __init__(self, ignored: list[Tensor]) -> None:
        self.now = 0
        self.peak = 0
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._ignored:
            return _Held(tensor, lambda: None)
        self._holders[address] = self._holders.get(address, 0) + 1
        if self._holders[address] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        return _Held(tensor, lambda: self._release(address, size))

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            del self._holders[address]
            self.now -= size


class _Held:
    """A saved tensor; autograd drops it when the backward pass is through."""

    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor, self._release = tensor, release

    def __del__(self) -> None:
        self._release()


def state_bytes(engine: Any) -> list[bytes]:
    tensors = [parameter.detach() for piece in engine.pieces for parameter in piece.parameters()]
    for group in engine.optimizer.optimizer.param_groups:
        tensors += [parameter.detach() for parameter in group["params"]]
    for state in engine.optimizer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]

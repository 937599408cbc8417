"""What a pipeline pays beyond the model's own arithmetic: messages between stages, and units that the plan misjudges.

All units run on one process, each as a piece of its own that hands its message to the next, so each can be timed apart.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_metro.analysis.cost import BACKWARD_OVER_FORWARD, FLOPS_PER_BYTE, MessageFormat, UnitCost, unit_costs
from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import Unit, build_chain
from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.payload import payload_rows
from megatron_metro.config.schema import RunConfig
from megatron_metro.device import keep_freed_memory
from megatron_metro.losses.step import StepLosses, count_tokens
from megatron_metro.model.build import build_pieces
from megatron_metro.parallel.boundary import BoundaryPayload, pack, unpack
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.parallel.layout import StageLayout, format_units, parse
from megatron_metro.parallel.stage_plan import plan_layout
from megatron_metro.training.benchmark import (
    Workload,
    benchmark_vocabulary,
    build_step,
    draw_microbatch,
    measure_gemm,
    metro_run,
    start_process,
    summarise,
    time_call,
    time_side_by_side,
)
from megatron_metro.training.optimizer import wrap

ELEMENT_SIZE = 4  # FP32
FLOPS_PASSES = 1 + BACKWARD_OVER_FORWARD
PIPELINES = ((2, 1), (4, 1), (4, 2))  # stages, chunks per stage
UNIT_WORKLOADS = tuple(
    Workload(hidden_size=512, num_layers=2, micro_batch_size=4, vocab_size=vocab_size) for vocab_size in (8192, 32768)
)
MAIN_UNIT_SHARE = 0.25  # of an encoder layer's work: smaller units hardly matter to a balance

Report = Callable[[str], None]


def measure_pipeline(num_rounds: int, num_warmups: int, report: Report) -> dict[str, Any]:
    """The benchmark's result: `payload_percent` of a step, and how far unit times lie from the plan's."""
    groups = start_process()
    payload = measure_payload(Workload(), groups, num_rounds, num_warmups, report)
    units = [measure_units(workload, groups, num_rounds, num_warmups, report) for workload in UNIT_WORKLOADS]
    return {
        "payload_percent": max(payload["percent_of_step"].values()),
        "unit_deviation_percent": max(found["largest_deviation_percent"] for found in units),
        "payload": payload,
        "units": units,
    }


def measure_payload(
    workload: Workload, groups: ParallelGroups, num_rounds: int, num_warmups: int, report: Report
) -> dict[str, Any]:
    """Packing and unpacking, forward and backward, of all boundaries of planned layouts, in percent of a whole step."""
    run = metro_run(workload)
    contestants = {"step": build_step(run, groups)}
    for pp_size, vpp_size in PIPELINES:
        parallel = replace(
            run.parallel, pipeline_model_parallel_size=pp_size, num_virtual_stages_per_pipeline_rank=vpp_size
        )
        layout = plan_layout(replace(run, parallel=parallel))
        report(f"payload of {layout.format()}")
        crossings = [_build_crossing(run, piece[-1]) for piece in layout.pieces[:-1]]
        contestants[f"pp{pp_size}x{vpp_size}"] = _in_turn(crossings)
    timings = time_side_by_side(contestants, num_rounds, num_warmups, report)
    seconds = {name: [timing.processor for timing in taken] for name, taken in timings.items()}
    step = statistics.median(seconds["step"])
    return {
        "percent_of_step": {
            name: round(100 * statistics.median(taken) / step, 3) for name, taken in seconds.items() if name != "step"
        },
        "seconds": {name: summarise(taken) for name, taken in seconds.items()},
        "hidden_size": workload.hidden_size,
    }


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    return lambda: [call() for call in calls]


def _build_crossing(run: RunConfig, unit: Unit) -> Callable[[], object]:
    """What a boundary after `unit` costs both of its stages in a microbatch, without the sending."""
    lengths, b, h = static_lengths(run), run.training.micro_batch_size, run.model.hidden_size
    num_slots = round(lengths.masked)
    rows = payload_rows(
        unit,
        run.model,
        encoder_length=lengths.encoder,
        decoder_length=lengths.decoder,
        num_masked_slots=num_slots,
    )
    hidden, encoder_output = (
        torch.randn(count, b, h, requires_grad=True) for count in (rows.hidden, rows.encoder_output or 1)
    )
    payload = BoundaryPayload(
        hidden=hidden,
        encoder_output=encoder_output if rows.encoder_output else None,
        sampled_ids=torch.randint(benchmark_vocabulary(run).vocab_size, (b, num_slots)) if rows.aux else None,
        replaced_prob=torch.rand(b, num_slots) if rows.num_weight_digits else None,
    )
    gradients = [torch.randn_like(part) for part in (payload.hidden, payload.encoder_output) if part is not None]

    def cross() -> None:
        sent = pack(payload, rows)
        received = sent.detach().requires_grad_()
        arrived = unpack(received, rows, num_slots)
        parts = [part for part in (arrived.hidden, arrived.encoder_output) if part is not None]
        torch.autograd.backward(parts, gradients)
        hidden.grad = encoder_output.grad = None
        sent.backward(received.grad)

    return cross


@dataclass(frozen=True, slots=True)
class TimedPiece:
    """A piece and the unit before it, whose message it reads."""

    units: tuple[Unit, ...]
    previous: Unit | None
    module: DistributedDataParallel

    def run(self, messages: dict[Unit, Tensor], microbatch: Microbatch) -> None:
        """Forward and backward; takes its message from `messages` and leaves its own there. Gradients are ones."""
        message = messages[self.previous].requires_grad_() if self.previous is not None else None
        self.module.module.set_input_tensor([message])
        output = self.module(microbatch)
        output.backward(torch.ones_like(output))
        messages[self.units[-1]] = output.detach()


def build_timed_pieces(run: RunConfig, groups: ParallelGroups, microbatch: Microbatch) -> list[TimedPiece]:
    """Every unit as a piece, and both last layers in one piece with their heads, where they run at slots only."""
    chain = build_chain(run.model)
    alone = StageLayout(pieces=tuple((unit,) for unit in chain), pp_size=len(chain))
    num_layers = run.model.generator_num_layers, run.model.encoder_num_layers, run.model.decoder_num_layers
    before = [max(count - 1, 0) for count in num_layers]
    joined = parse(f"G{'g' * before[0]}|gM|{'e' * num_layers[1]}RD{'d' * before[2]}|dL", chain, 4)
    pieces = []
    for layout, ranks in ((alone, range(len(chain))), (joined, (1, 3))):
        for rank in ranks:
            place = replace(groups, pp_rank=rank, pp_size=layout.pp_size)
            built = build_pieces(run, layout, place, torch.float32, benchmark_vocabulary(run).pad_id)
            for piece in built:
                piece.losses = StepLosses(run.objective, count_tokens([microbatch]), loss_scale=torch.ones([]))
            (module,) = wrap(run, built, groups)
            previous = layout.pieces[rank - 1][-1] if rank else None
            pieces.append(TimedPiece(layout.pieces[rank], previous, module))
    return pieces


def run_pieces(pieces: Sequence[TimedPiece], microbatch: Microbatch) -> list[float]:
    """Seconds of each piece's forward and backward pass, one piece after the other."""
    messages: dict[Unit, Tensor] = {}
    seconds = []
    for piece in pieces:
        piece.module.zero_grad_buffer()
        seconds.append(time_call(partial(piece.run, messages, microbatch)).processor)
    return seconds


def measure_units(
    workload: Workload, groups: ParallelGroups, num_rounds: int, num_warmups: int, report: Report
) -> dict[str, Any]:
    """Times of units against the plan's ratios; both are scaled to the same sum over the units of the chain."""
    keep_freed_memory()  # the plan is for devices whose allocator does
    run = metro_run(workload)
    microbatch = draw_microbatch(run)
    pieces = build_timed_pieces(run, groups, microbatch)
    gemm, rounds = measure_gemm(), []
    for number in range(num_warmups + num_rounds):
        seconds = run_pieces(pieces, microbatch)
        report(f"units, h {workload.hidden_size}, V {workload.vocab_size}, round {number + 1}: {sum(seconds):.3f} s")
        if number >= num_warmups:
            rounds.append(seconds)
    return {
        "vocab_size": workload.vocab_size,
        "hidden_size": workload.hidden_size,
        "gemm_gflops": round(gemm / 1e9, 2),
        **compare_with_plan(run, [piece.units for piece in pieces], np.asarray(rounds)),
    }


def compare_with_plan(run: RunConfig, pieces: Sequence[tuple[Unit, ...]], seconds_RP: np.ndarray) -> dict[str, Any]:
    """Deviations of measured from planned times; pieces alike (layers of a network) are taken together.

    `seconds_RP` are those of each piece in each round. Planned is `UnitCost.work`, and by FLOPs alone.
    """
    message = MessageFormat(micro_batch_size=run.training.micro_batch_size, element_size=ELEMENT_SIZE)
    costs = {cost.unit: cost for cost in unit_costs(run.model, static_lengths(run), message)}
    names = [format_units(units) for units in pieces]
    rows = {kind: [i for i, name in enumerate(names) if name == kind] for kind in dict.fromkeys(names)}
    times = {kind: float(np.median(seconds_RP[:, found])) for kind, found in rows.items()}
    plans = {kind: _plan_piece([costs[unit] for unit in pieces[found[0]]]) for kind, found in rows.items()}
    flops = {kind: FLOPS_PASSES * run.training.micro_batch_size * found[0] for kind, found in plans.items()}
    work = {kind: found[1] for kind, found in plans.items()}
    by_work, by_flops = (_deviations(times, planned, names[: len(costs)]) for planned in (work, flops))
    main = [kind for kind in rows if work[kind] >= MAIN_UNIT_SHARE * work["e"]]
    return {
        "largest_deviation_percent": max(abs(by_work[kind]) for kind in main),
        "largest_deviation_by_flops_percent": max(abs(by_flops[kind]) for kind in main),
        "main_units": main,
        **_fit_machine(times, flops, work),
        "by_unit": {
            kind: {
                "seconds": summarise(seconds_RP[:, rows[kind]].ravel().tolist()),
                "deviation_percent": by_work[kind],
                "deviation_by_flops_percent": by_flops.get(kind),
            }
            for kind in rows
        },
    }


def _plan_piece(held: Sequence[UnitCost]) -> tuple[float, float]:
    """Forward FLOPs of a sequence and work of a microbatch."""
    is_cut = held[-1].unit.kind != "lm_head"
    flops = sum(cost.forward_flops for cost in held) + is_cut * held[-1].extra_flops_if_cut
    return flops, sum(cost.work for cost in held) + is_cut * held[-1].extra_work_if_cut


def _deviations(times: Mapping[str, float], planned: Mapping[str, float], chain: Sequence[str]) -> dict[str, float]:
    """Percent by which times exceed the plan, scaled to take as long as the whole chain did."""
    scale = sum(times[kind] for kind in chain) / sum(planned[kind] for kind in chain)
    return {kind: round(100 * (times[kind] / (scale * planned[kind]) - 1), 1) for kind in times if planned[kind]}


def _fit_machine(times: Mapping[str, float], flops: Mapping[str, float], work: Mapping[str, float]) -> dict[str, float]:
    """The two numbers of seconds = FLOPs / rate + bytes / bandwidth that fit the relative times best."""
    kinds = [kind for kind in times if flops[kind]]
    moved = {kind: (work[kind] - flops[kind]) / FLOPS_PER_BYTE[ELEMENT_SIZE] for kind in kinds}
    measured = np.asarray([times[kind] for kind in kinds])
    terms = np.asarray([[flops[kind], moved[kind]] for kind in kinds]) / measured[:, None]
    per_flop, per_byte = np.linalg.lstsq(terms, np.ones(len(kinds)), rcond=None)[0]
    return {
        "fitted_gflops_per_second": round(1e-9 / float(per_flop), 2),
        "fitted_flops_per_byte": round(float(per_byte / per_flop), 2),
        "planned_flops_per_byte": FLOPS_PER_BYTE[ELEMENT_SIZE],
    }

"""From a run's configuration to its layout and the table that explains it; no process groups, no GPU."""

from dataclasses import dataclass

from megatron_metro.analysis.cost import MessageFormat, UnitCost, count_parameters, unit_costs
from megatron_metro.config.chain import Unit, build_chain
from megatron_metro.config.lengths import static_lengths
from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.layout import StageLayout, balance, format_units, parse


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceReport:
    """What one piece of the chain holds, computes and sends."""

    rank: int
    chunk: int
    units: tuple[Unit, ...]
    parameters: int  # before tensor parallelism; a copy of a shared weight counts
    work: float  # per microbatch, forward and backward, in FLOPs: predicts its time (analysis.cost)
    forward_flops: float  # per sequence, as this very piece runs its units
    bytes_sent: int  # per microbatch, forward; the backward message is as large


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """A layout with its costs."""

    layout: StageLayout
    pieces: tuple[PieceReport, ...]
    num_parameters: int  # of the model, before tensor parallelism; shared weights count once
    num_microbatches: int

    @property
    def imbalance(self) -> float:
        """FLOPs of the costliest piece over the mean of the pieces; 1 is perfect."""
        flops = [piece.forward_flops for piece in self.pieces]
        return max(flops) * len(flops) / sum(flops)

    @property
    def time_imbalance(self) -> float:
        """The same of predicted times."""
        work = [piece.work for piece in self.pieces]
        return max(work) * len(work) / sum(work)

    @property
    def rank_imbalance(self) -> float:
        """The same over pipeline ranks, whose chunks add up."""
        loads = [0.0] * self.layout.pp_size
        for piece in self.pieces:
            loads[piece.rank] += piece.forward_flops
        return max(loads) * len(loads) / sum(loads)

    @property
    def bubble(self) -> float:
        """Idle share of a pipeline rank when all pieces cost the same: (p - 1) / (m v + p - 1)."""
        idle = self.layout.pp_size - 1
        return idle / (self.num_microbatches * self.layout.vpp_size + idle)


def plan_layout(config: RunConfig) -> StageLayout:
    """The layout of a run: the one written by hand, or else the best balanced. Errors: LayoutError."""
    return _cut_by_hand_or_cost(config, _costs(config))


def plan_stages(config: RunConfig, num_microbatches: int) -> StagePlan:
    """The layout of a run with the costs of every piece."""
    costs = _costs(config)
    layout = _cut_by_hand_or_cost(config, costs)
    cost_of = {cost.unit: cost for cost in costs}
    pieces = []
    for index, units in enumerate(layout.pieces):
        rank, chunk = layout.place(index)
        held = [cost_of[unit] for unit in units]
        is_cut = not layout.is_last(index)
        pieces.append(
            PieceReport(
                rank=rank,
                chunk=chunk,
                units=units,
                parameters=count_parameters(units, config.model),
                work=sum(cost.work for cost in held) + held[-1].extra_work_if_cut * is_cut,
                forward_flops=sum(cost.forward_flops for cost in held) + held[-1].extra_flops_if_cut * is_cut,
                bytes_sent=held[-1].bytes_sent,
            )
        )
    return StagePlan(
        layout=layout,
        pieces=tuple(pieces),
        num_parameters=count_parameters(layout.chain, config.model),
        num_microbatches=num_microbatches,
    )


def format_stages(plan: StagePlan) -> str:
    """The plan as a Markdown table and the flag that reproduces its layout."""
    total_flops, total_work = (sum(getattr(p, name) for p in plan.pieces) for name in ("forward_flops", "work"))
    lines = [
        "| piece | rank | chunk | units | parameters | FLOPs | time | bytes sent |",
        "|---:|---:|---:|:---|---:|---:|---:|---:|",
    ]
    for index, piece in enumerate(plan.pieces):
        lines.append(
            f"| {index} | {piece.rank} | {piece.chunk} | {format_units(piece.units)} | {piece.parameters:,} "
            f"| {100 * piece.forward_flops / total_flops:.2f} % | {100 * piece.work / total_work:.2f} % "
            f"| {piece.bytes_sent:,} |"
        )
    lines += [
        "",
        f"parameters of the model: {plan.num_parameters:,} (copies of shared weights counted once)",
        f"largest/mean piece: {plan.imbalance:.4f} (predicted times: {plan.time_imbalance:.4f})",
        f"largest/mean rank: {plan.rank_imbalance:.4f}",
        f"theoretical bubble at {plan.num_microbatches} microbatches: {100 * plan.bubble:.2f} %",
        f'--pipeline-model-parallel-layout "{plan.layout.format()}"',
    ]
    return "\n".join(lines)


def _costs(config: RunConfig) -> tuple[UnitCost, ...]:
    parallel, optimizer = config.parallel, config.optimizer
    message = MessageFormat(
        micro_batch_size=config.training.micro_batch_size,
        element_size=2 if optimizer.bf16 or optimizer.fp16 else 4,
        sequence_shards=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
    )
    return unit_costs(config.model, static_lengths(config), message)


def _cut_by_hand_or_cost(config: RunConfig, costs: tuple[UnitCost, ...]) -> StageLayout:
    parallel, chain = config.parallel, build_chain(config.model)
    pp_size, vpp_size = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if parallel.pipeline_model_parallel_layout is not None:
        return parse(parallel.pipeline_model_parallel_layout, chain, pp_size, vpp_size)
    return balance(
        chain,
        [cost.forward_flops for cost in costs],
        [cost.bytes_sent for cost in costs],
        pp_size,
        vpp_size,
        extra_if_cut=[cost.extra_flops_if_cut for cost in costs],
    )

"""Every way to lay a run over a few processes, as rows of the parity matrix."""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from megatron_metro.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig
from tests.helpers import tiny
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Case

# What FP32 rows change of design section 5, because at its lr 1e-3 one rounding of a norm weight near 1 (1.2e-7)
# already is 2.4e-5 of the five-step update 5e-3; and because Adam turns the rounding noise of gradients that are zero in theory
# (those of key biases) into updates of full size unless epsilon stands well above that noise.
FP32_OPTIMIZER = {"lr": 1e-1, "adam_eps": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: where the model and the batch go, and what is special about the run."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    micro_batch_size: int = 2
    distributed_optimizer: bool = False  # in FP32: core's distributed optimizer refuses float64
    overlap: bool = False  # of gradient reduction, and of the parameter gather under the distributed optimizer
    recompute: str | None = None
    padded: bool = False
    spans: bool = False
    layout: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_microbatches(self) -> int:
        return GLOBAL_BATCH_SIZE // (self.micro_batch_size * self.dp)

    @property
    def name(self) -> str:
        """Short, for test ids and tables."""
        parts = [f"tp{self.tp}{'sp' if self.sp else ''}", f"pp{self.pp}x{self.vpp}", f"dp{self.dp}"]
        parts.append(f"m{self.num_microbatches}")
        parts += ["dist-opt"] if self.distributed_optimizer else []
        parts += ["overlap"] if self.overlap else []
        parts += [self.recompute] if self.recompute else []
        parts += ["padded"] if self.padded else []
        parts += ["spans"] if self.spans else []
        parts += [self.layout] if self.layout else []
        parts += [f"{k}={v}" for k, v in {**self.model, **self.objective}.items()]
        return " ".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.distributed_optimizer else torch.float64

    @property
    def tolerance(self) -> float:
        """Design section 5: float64 1e-9; FP32 1e-5 where core refuses float64."""
        return 1e-5 if self.distributed_optimizer else 1e-9

    def case(self) -> Case:
        """What the processes run."""
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.sp,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vpp,
            use_distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and self.distributed_optimizer,
            recompute_granularity=self.recompute,  # type: ignore[arg-type]
        )
        return self._case(parallel)

    def reference(self) -> Case:
        """The same numbers on one process, in one microbatch."""
        alone = replace(self, micro_batch_size=GLOBAL_BATCH_SIZE, layout=None)
        return alone._case(ParallelConfig())

    def reference_key(self) -> str:
        """Rows with equal keys share a reference."""
        return repr((self.dtype, self.padded, self.spans, self.model, self.objective))

    def _case(self, parallel: ParallelConfig) -> Case:
        model: ModelConfig = tiny.tiny_model(**self.model)
        optimizer = FP32_OPTIMIZER if self.distributed_optimizer else {}
        run = tiny.tiny_run(model, parallel, ObjectiveConfig(**self.objective), **optimizer)
        return Case(
            run=run,
            micro_batch_size=self.micro_batch_size,
            dtype=self.dtype,
            padded=self.padded,
            spans=self.spans,
            layout=self.layout,
        )


def all_rows(world_size: int) -> list[Row]:
    """Every (TP, SP, PP, VPP, DP, number of microbatches) of so many processes that megatron-core's schedules take."""
    rows = []
    for tp, pp in product((1, 2, 4), (1, 2, 3, 4)):
        if world_size % (tp * pp):
            continue
        dp = world_size // (tp * pp)
        for sp, vpp, size in product((False, True), (1, 2, 3, 4), (1, 2, 3, 6, 12)):
            count, rest = divmod(GLOBAL_BATCH_SIZE, size * dp)
            if rest or count == 0 or (sp and tp == 1) or (vpp > 1 and (pp == 1 or count % pp)):
                continue
            if pp * vpp > 11:  # the tiny chain has 11 units
                continue
            rows.append(Row(tp=tp, sp=sp, pp=pp, vpp=vpp, dp=dp, micro_batch_size=size))
    return rows

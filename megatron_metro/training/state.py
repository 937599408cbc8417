"""How far a run has come: the numbers that, with weights and optimizer state, let it go on."""

from dataclasses import dataclass
from typing import Any

from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.groups import ParallelGroups


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Counts since the start of the run."""

    iteration: int = 0  # steps, skipped ones included
    skipped_iterations: int = 0  # steps that changed no weight because a gradient was not finite
    consumed_samples: int = 0  # training sequences over all data-parallel ranks
    consumed_valid_samples: int = 0  # validation sequences, likewise

    @property
    def num_updates(self) -> int:
        """Completed optimizer updates, on which the learning rate depends."""
        return self.iteration - self.skipped_iterations


def describe_layout(config: RunConfig, groups: ParallelGroups, kind: str) -> dict[str, Any]:
    """What must be equal for each rank to hold the same layers and samples as the rank that saved."""
    return {
        "device": kind,
        "tensor": groups.tp_size,
        "pipeline": groups.pp_size,
        "virtual": config.parallel.num_virtual_stages_per_pipeline_rank,
        "pieces": config.parallel.pipeline_model_parallel_layout,
        "data": groups.dp_size,
    }

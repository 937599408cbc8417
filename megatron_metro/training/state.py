"""How far a run has come: the numbers that, with weights and optimizer state, let it go on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_metro.config.schema import RunConfig
from megatron_metro.parallel.groups import ParallelGroups


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Counts since the start of the run."""

    iteration: int = 0  # steps, skipped ones included
    skipped_iterations: int = 0  # steps that changed no weight
    consumed_samples: int = 0  # training sequences over all data-parallel ranks
    consumed_valid_samples: int = 0  # validation sequences, likewise
    consumed_tokens: int = 0  # of the text in the training sequences, padding excluded
    unreported: Sequence[Mapping[str, Any]] = ()  # in checkpoints: the steps since the last log line (`Window`)
    nonfinite_in_a_row: int = 0  # steps up to now whose losses or gradients were not finite, but for FP16's scaling
    recent_losses: tuple[float, ...] = ()  # total losses in nats of the last steps, finite ones: what is usual

    @property
    def num_updates(self) -> int:
        """Completed optimizer updates, on which the learning rate depends."""
        return self.iteration - self.skipped_iterations


def restore_state(numbers: Mapping[str, Any]) -> TrainState:
    """The state whose fields a step's document holds; those it does not know are at their start."""
    sequences = {name: tuple(numbers.get(name, ())) for name in ("unreported", "recent_losses")}  # JSON knows lists
    return TrainState(**{**numbers, **sequences})


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

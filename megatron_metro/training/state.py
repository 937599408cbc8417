"""How far a run has come: the numbers that, with weights and optimizer state, let it go on."""

from dataclasses import dataclass


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

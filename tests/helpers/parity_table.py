"""The parity matrix as a Markdown table, printed row by row:

    python -m tests.helpers.parity_table [--world N ...] [--sample K]

The exit code is 1 when a row misses its tolerance.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from tqdm import tqdm

from megatron_metro.device import activate
from megatron_metro.parallel.groups import single_process
from tests.helpers.distributed import WorkerPool
from tests.helpers.layouts import Row, matrix
from tests.helpers.parity import Outcome, run_case, worst_error, worst_metric_error

HEADER = (
    "| layout | processes | microbatches | losses | gradients | updates | tolerance | same samples |",
    "|---|---|---|---|---|---|---|---|",
)

ROW_TIMEOUT_SECONDS = 600.0  # a row takes seconds, unless the machine is busy


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far a row is from one process: the worst error of each kind (design section 5)."""

    losses: float  # every logged number and the gradient norm, at every step
    gradients: float | None  # None under the distributed optimizer, where no rank holds a whole gradient
    updates: float
    has_same_samples: bool | None  # None where the model has no generator

    def are_within(self, tolerance: float) -> bool:
        """Whether the row passes."""
        worst = max(self.losses, self.updates, self.gradients or 0.0)
        return worst <= tolerance and self.has_same_samples is not False


@dataclass(frozen=True, slots=True)
class References:
    """Outcomes on this one process, which rows share; computed when first needed."""

    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    def find(self, row: Row) -> Outcome:
        """The outcome that a row must have; this process alone must be a job of its own (`single_process`)."""
        key = row.reference_key()
        if key not in self._outcomes:
            outcome = run_case(row.reference())
            assert outcome is not None
            self._outcomes[key] = outcome
        return self._outcomes[key]


def measure(row: Row, workers: WorkerPool, references: References) -> Errors:
    """Run a row and compare it with one process."""
    expected = references.find(row)
    found: Outcome = workers.run(run_case, row.case(), timeout=ROW_TIMEOUT_SECONDS)[0]
    norms = [[{"norm": norm} for norm in outcome.norms] for outcome in (found, expected)]
    has_same_samples = None
    if expected.sampled_ids is not None:
        has_same_samples = np.array_equal(found.sampled_ids, expected.sampled_ids)
    return Errors(
        losses=max(worst_metric_error(found.metrics, expected.metrics), worst_metric_error(*norms)),
        gradients=worst_error(found.gradients, expected.gradients)[0] if found.gradients else None,
        updates=worst_error(found.updates, expected.updates)[0],
        has_same_samples=has_same_samples,
    )


def format_row(row: Row, errors: Errors) -> str:
    """One line of the table."""
    name = f"`{row.name}`".replace("|", r"\|")
    gradients = "-" if errors.gradients is None else f"{errors.gradients:.0e}"
    samples = {True: "yes", False: "**NO**", None: "-"}[errors.has_same_samples]
    cells = [name, row.world_size, row.num_microbatches, f"{errors.losses:.0e}", gradients, f"{errors.updates:.0e}"]
    cells += [f"{row.tolerance:.0e}" + ("" if errors.are_within(row.tolerance) else " **MISSED**"), samples]
    return f"| {' | '.join(map(str, cells))} |"


def choose_rows(world_sizes: Sequence[int], sample: int | None) -> list[Row]:
    """The matrix's rows on these numbers of processes; with `sample`, so many of them, of every group alike."""
    groups = [rows for rows in matrix().values() if rows[0].world_size in world_sizes]
    if sample is None:
        return [row for rows in groups for row in rows]
    rng = random.Random(1)
    shuffled = [rng.sample(rows, len(rows)) for rows in groups]
    in_turn = [row for turn in zip_longest(*shuffled) for row in turn if row is not None]
    return sorted(in_turn[:sample], key=lambda row: row.world_size)


def print_table(rows: Sequence[Row]) -> bool:
    """Measure and print every row; whether all have passed. Rows on as many processes stand together."""
    print(*HEADER, sep="\n", flush=True)
    references, workers, num_missed = References(), None, 0
    single_process(activate("cpu"))
    try:
        for row in tqdm(rows, unit="layout", file=sys.stderr, disable=not sys.stderr.isatty()):
            if workers is None or workers.world_size != row.world_size:
                if workers is not None:
                    workers.close()
                workers = WorkerPool(row.world_size)
            errors = measure(row, workers, references)
            num_missed += not errors.are_within(row.tolerance)
            tqdm.write(format_row(row, errors), file=sys.stdout)
            sys.stdout.flush()
    finally:
        if workers is not None:
            workers.close()
    print(f"\n{len(rows) - num_missed} of {len(rows)} layouts equal one process.")
    return num_missed == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, print, exit code."""
    parser = argparse.ArgumentParser(description="Print the parity matrix as a Markdown table.")
    parser.add_argument(
        "--world", type=int, nargs="+", choices=(1, 2, 3, 4), default=(1, 2, 3, 4), help="numbers of processes"
    )
    parser.add_argument("--sample", type=int, help="so many rows instead of all, always the same ones")
    options = parser.parse_args(arguments)
    return 0 if print_table(choose_rows(options.world, options.sample)) else 1


if __name__ == "__main__":
    sys.exit(main())

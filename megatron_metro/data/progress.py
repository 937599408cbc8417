"""How preprocessing shows that it moves: a bar on a terminal, a line now and then elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from megatron_metro.data.corpus import find_inputs
from megatron_metro.data.preprocess import PreprocessReport


@contextmanager
def show_progress(
    inputs: Sequence[str], log_interval: int, stream: TextIO
) -> Iterator[Callable[[PreprocessReport], None]]:
    """A function to call with each report; without a terminal it writes every `log_interval` documents."""
    if not stream.isatty():
        logged = 0

        def log(report: PreprocessReport) -> None:
            nonlocal logged
            if report.num_documents - logged >= log_interval:
                logged = report.num_documents
                stream.write(
                    f"{logged} documents, {report.num_tokens} tokens, "
                    f"{report.num_tokens / max(report.seconds, 1e-9):,.0f} tokens/s\n"
                )

        yield log
        return
    total = sum(path.stat().st_size for path in find_inputs(inputs))
    with tqdm(total=total, unit="B", unit_scale=True, file=stream, desc="preprocessing") as bar:

        def advance(report: PreprocessReport) -> None:
            bar.set_postfix(tokens=f"{report.num_tokens:,}", refresh=False)
            bar.update(report.read_bytes - bar.n)

        yield advance

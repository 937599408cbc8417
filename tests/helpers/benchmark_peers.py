"""What the benchmark is held against: METRO with transformers, core's T5 dataset, torch without the CPU adapter."""

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_metro.tokenizer import Tokenizer
from megatron_metro.training.benchmark import Workload, draw_microbatch, metro_run
from tests.helpers.adapter_cost import measure_adapter_overhead

ENCODER_LENGTH, DECODER_LENGTH = 512, 128
NUM_SAMPLES = 10_000


def build_hf_peers(workload: Workload, names: Sequence[str]) -> dict[str, Callable[[], float]]:
    """Steps of "hf", and of "hf_masked" with heads at masked positions only; needs transformers where any is named."""
    if not names:
        return {}
    from tests.helpers.hf_metro import build_hf_step

    run = metro_run(workload)
    microbatch = draw_microbatch(run)
    return {name: build_hf_step(run, microbatch, masked_heads=name == "hf_masked") for name in names}


def measure_adapter() -> dict[str, dict[str, float]]:
    """Percent that the CPU adapter adds to forward and backward passes, by width."""
    return {"adapter_percent": {f"h{width}": round(measure_adapter_overhead(width), 2) for width in (64, 256)}}


class WordPieceNames:
    """Our tokenizer under the names that core's masked datasets ask for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.unique_identifiers = {"sha256": tokenizer.sha256}
        self.cls = self.bos = tokenizer.bos_id
        self.sep = self.eos = self.eod = tokenizer.eos_id
        self.pad, self.mask = tokenizer.pad_id, tokenizer.mask_id
        self.additional_special_tokens_ids = list(tokenizer.sentinel_ids)
        self.inv_vocab = {token: tokenizer.piece(token) for token in range(tokenizer.vocab_size)}


def build_core_dataset(prefix: str, tokenizer: Tokenizer) -> T5MaskedWordPieceDataset:
    """Megatron's defaults for T5 (spans of a geometric length, 15 %) over files that store a sequence per line."""
    indexed = IndexedDataset(prefix)
    config = T5MaskedWordPieceDatasetConfig(
        random_seed=1234,
        sequence_length=ENCODER_LENGTH,
        sequence_length_decoder=DECODER_LENGTH,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=str(Path(prefix).parent / "core_cache"),
        tokenizer=WordPieceNames(tokenizer),
        masking_probability=0.15,
        short_sequence_probability=0.0,
        masking_max_ngram=10,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=True,
    )
    documents = np.arange(T5MaskedWordPieceDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return T5MaskedWordPieceDataset(indexed, prefix, documents, NUM_SAMPLES, Split.train, config)


def build_core_reader(prefix: str, tokenizer: Tokenizer, num_blocks: int) -> Callable[[], Sequence[object]]:
    """Reads the next `num_blocks` samples at each call, from the beginning again after the last."""
    dataset = build_core_dataset(prefix, tokenizer)
    samples = count()
    return lambda: [dataset[next(samples) % len(dataset)] for _ in range(num_blocks)]


def measure_writing(num_rounds: int, num_warmups: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Speed of decoding; needs transformers."""
    from tests.helpers import benchmark_writing

    return benchmark_writing.measure_writing(num_rounds, num_warmups, report)

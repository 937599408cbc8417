"""Sources and targets: lines to ids, ids to rows, rows to microbatches; every bad line is named."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_metro.batch import Microbatch
from megatron_metro.config.cli import parse_run
from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.schema import DataConfig, ObjectiveConfig, RunConfig, TokenizerConfig, TrainingConfig
from megatron_metro.data.loader import StepLoader, build_loaders
from megatron_metro.data.pair_rows import PairSource, fill_rows
from megatron_metro.data.vocabulary_training import VocabularyOptions, train_vocabulary, write_vocabulary
from megatron_metro.tokenizer import Tokenizer
from tests.helpers.corpus import NUM_SENTINELS, Corpus
from tests.helpers.objective_cases import check_contract
from tests.helpers.pair_cases import METRO_IDS, T5_IDS, draw_examples, group, make_batch

WORDS = "abc bcd cde def efg fgh ghi hij"


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs))
    return path


def draw_pairs(count: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(3)
    words = WORDS.split()
    return [
        (" ".join(rng.choice(words, rng.integers(1, 5))), " ".join(rng.choice(words, rng.integers(1, 3))))
        for _ in range(count)
    ]


def make_run(path: Path, model: Path, is_packed: bool = False, **data: object) -> RunConfig:
    values = {"encoder_seq_length": 64, "decoder_seq_length": 32, "split": "80,20,0", "num_workers": 0}
    run = RunConfig(
        objective=ObjectiveConfig(objective="text-to-text"),
        tokenizer=TokenizerConfig(tokenizer_model=str(model), vocab_extra_ids=NUM_SENTINELS),
        data=DataConfig(data_path=(str(path),), pack_examples=is_packed, **{**values, **data}),  # type: ignore[arg-type]
        training=TrainingConfig(micro_batch_size=4),
    )
    return replace(run, model=replace(run.model, generator_num_layers=0))


def load(run: RunConfig, dp_rank: int = 0, dp_size: int = 1) -> StepLoader:
    assert run.tokenizer.tokenizer_model is not None
    tokenizer = Tokenizer.load(run.tokenizer.tokenizer_model, run.tokenizer.vocab_extra_ids)
    return build_loaders(run, tokenizer, dp_rank, dp_size)[0]


def source_of(loader: StepLoader) -> PairSource:
    [source] = loader.mixture.sources
    assert isinstance(source, PairSource)
    return source


@pytest.fixture(scope="module")
def t5_model(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    options = VocabularyOptions(inputs=(str(corpus.jsonl),), vocab_size=200, is_t5=True)
    return write_vocabulary(train_vocabulary(options), str(folder / "t5"))[0]


def read_rows(batch: Microbatch) -> list[list[tuple[list[int], list[int]]]]:
    """The examples of each row, told apart by segments alone, or the row where there are none."""
    rows = []
    for row in range(len(batch.encoder_tokens)):
        assert batch.encoder_padding is not None and batch.decoder_padding is not None
        real = ~batch.encoder_padding[row], ~batch.decoder_padding[row]
        segments = [real[0].long() - 1, torch.where(real[1], 0, -1)]
        if batch.encoder_segments is not None and batch.decoder_segments is not None:
            segments = [batch.encoder_segments[row], torch.where(real[1], batch.decoder_segments[row], -1)]
        count = int(segments[0].max()) + 1
        assert count == int(segments[1].max()) + 1
        sides = zip((batch.encoder_tokens[row], batch.target_ids[row]), segments)
        texts = [[tokens[numbers == example].tolist() for example in range(count)] for tokens, numbers in sides]
        rows.append(list(zip(*texts)))
    return rows


@pytest.mark.parametrize("is_t5", [False, True], ids=["metro", "t5"])
def test_lines_become_framed_ids_and_an_epoch_holds_each_once(
    is_t5: bool, corpus: Corpus, t5_model: Path, tmp_path: Path
) -> None:
    model, pairs = t5_model if is_t5 else corpus.model, draw_pairs(40)
    run = make_run(write_pairs(tmp_path / "pairs.jsonl", pairs), model, split="100,0,0")
    tokenizer = Tokenizer.load(model, NUM_SENTINELS)
    start, end = ([], [1]) if is_t5 else ([0], [2])
    expected = [([*start, *tokenizer.encode(a), *end], [*tokenizer.encode(b), *end]) for a, b in pairs]
    loader = load(run)
    found = [row for batch in loader.next_step(10) for row in read_rows(batch)]
    assert sorted(found) == sorted([pair] for pair in expected)
    assert found != [[pair] for pair in expected]
    again = [row for batch in loader.next_step(10) for row in read_rows(batch)]
    assert sorted(again) == sorted(found) and again != found


def test_packed_rows_hold_the_same_examples_in_fewer_rows(corpus: Corpus, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", draw_pairs(60))
    whole = load(make_run(path, corpus.model, split="100,0,0", data_cache_path=str(tmp_path / "cache")))
    packed = load(make_run(path, corpus.model, True, split="100,0,0", data_cache_path=str(tmp_path / "cache")))
    num_rows = source_of(packed).num_blocks
    assert num_rows < 20
    rows = [row for batch in packed.next_step(-(-num_rows // 4)) for row in read_rows(batch)][:num_rows]
    alone = [row[0] for batch in whole.next_step(15) for row in read_rows(batch)]
    assert sorted(pair for row in rows for pair in row) == sorted(alone)
    assert max(map(len, rows)) > 2
    # Read from the cache, and made without one, they are the same.
    for other in (
        make_run(path, corpus.model, True, split="100,0,0", data_cache_path=str(tmp_path / "cache")),
        make_run(path, corpus.model, True, split="100,0,0"),
    ):
        source, expected = source_of(load(other)), source_of(packed)
        assert np.array_equal(source.rows.examples, expected.rows.examples)
        assert np.array_equal(source.read(np.arange(9)).tokens, expected.read(np.arange(9)).tokens)
    assert "examples in" in packed.mixture.describe()[0] and "padding" in packed.mixture.describe()[0]


def test_any_layout_and_any_start_reads_the_same_samples(corpus: Corpus, tmp_path: Path) -> None:
    run = make_run(write_pairs(tmp_path / "pairs.jsonl", draw_pairs(50)), corpus.model, True)
    alone = [batch.encoder_tokens for batch in load(run).next_step(6)]
    ranks = [load(run, rank, 2) for rank in range(2)]
    for rank, loader in enumerate(ranks):
        loader.rewind(8)
        found = [batch.encoder_tokens for batch in loader.next_step(2)]
        assert all(torch.equal(a, b) for a, b in zip(found, alone[2 + rank :: 2], strict=True))


def test_workers_read_the_same(corpus: Corpus, tmp_path: Path) -> None:
    run = make_run(write_pairs(tmp_path / "pairs.jsonl", draw_pairs(30)), corpus.model, True)
    expected = [batch.target_ids for batch in load(run).next_step(2)]
    loader = load(replace(run, data=replace(run.data, num_workers=1)))
    try:
        assert all(torch.equal(a, batch.target_ids) for a, batch in zip(expected, loader.next_step(2), strict=True))
    finally:
        loader.close()


def test_parts_and_blends(corpus: Corpus, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", draw_pairs(20))
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(write_pairs(tmp_path / "more", draw_pairs(10)).read_bytes()))
    run = make_run(path, corpus.model)
    train, valid = build_loaders(run, corpus.tokenizer, 0, 1)
    assert valid is not None
    assert [loader.mixture.sources[0].origin.documents for loader in (train, valid)] == [(0, 16), (16, 20)]
    own = replace(
        run.data, data_path=(), train_data_path=("1", str(path), "3", str(packed)), valid_data_path=(str(path),)
    )
    train, valid = build_loaders(replace(run, data=own), corpus.tokenizer, 0, 1)
    assert valid is not None and train.mixture.weights == (0.25, 0.75)
    unweighted = replace(own, train_data_path=(str(path), str(packed)))
    assert build_loaders(replace(run, data=unweighted), corpus.tokenizer, 0, 1)[0].mixture.weights == (2 / 3, 1 / 3)


GOOD = '{"source": "abc", "target": "bcd"}\n'
BAD_LINES = {
    "not JSON": ("{", ["is not JSON"]),
    "no object": ("[1]", ["holds list"]),
    "no target": ('{"source": "abc"}', ["'target'", "a line such as"]),
    "a number": ('{"source": "abc", "target": 3}', ["'target'", "int"]),
    "empty source": ('{"source": " ", "target": "a"}', ['empty "source"', "leave the line out"]),
    "empty target": ('{"source": "a", "target": ""}', ['empty "target"']),
    "long source": (
        json.dumps({"source": WORDS * 9, "target": "a"}),
        ['"source"', "--encoder-seq-length is 64", "--truncate-source"],
    ),
    "long target": (
        json.dumps({"source": "a", "target": WORDS * 9}),
        ['"target"', "--decoder-seq-length is 32", "--truncate-target"],
    ),
    "invalid UTF-8": ("\udcff", ["is not valid UTF-8"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, corpus: Corpus, tmp_path: Path) -> None:
    line, words = BAD_LINES[name]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes((GOOD + "\n" + line + "\n" + GOOD).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as said:
        load(make_run(path, corpus.model))
    text = str(said.value)
    assert text.startswith(f"{path}:3 ") and all(word in text for word in words), text
    assert "\n" not in text


def test_long_texts_are_cut_on_demand(corpus: Corpus, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [(WORDS * 9, WORDS * 9)])
    run = make_run(path, corpus.model, split="100,0,0", truncate_source=True, truncate_target=True)
    [batch] = load(run).next_step(1)
    [(source, target)] = read_rows(batch)[0]
    ids = corpus.tokenizer.encode(WORDS * 9)
    assert source == [0, *ids[:62], 2] and target == [*ids[:31], 2]


@pytest.mark.parametrize(
    ("content", "suffix", "words"),
    [
        (None, ".jsonl", ["--data-path", "cannot be read", "JSON lines"]),
        ("", ".jsonl", ["holds no example"]),
        ("\n\n", ".jsonl", ["holds no example"]),
        ("a text\n", ".txt", ["is plain text"]),
        (GOOD, ".jsonl", ["none of its 1 examples is in this split", "--valid-data-path"]),
    ],
)
def test_a_file_without_examples_is_refused(
    content: str | None, suffix: str, words: list[str], corpus: Corpus, tmp_path: Path
) -> None:
    path = tmp_path / f"pairs{suffix}"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as said:
        load(make_run(path, corpus.model, split="10,90,0" if content == GOOD else "80,20,0"))
    assert all(word in str(said.value) for word in words), said.value


def test_another_tokenizer_is_another_entry_of_the_cache(corpus: Corpus, t5_model: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", draw_pairs(10))
    loaders = [
        load(make_run(path, model, data_cache_path=str(tmp_path / "cache"), split="100,0,0"))
        for model in (corpus.model, t5_model, corpus.model)
    ]
    firsts = [source_of(loader).pairs.sources[0].tolist() for loader in loaders]
    assert firsts[0] == firsts[2] and firsts[0][0] == 0 and firsts[1][-1] == 1


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=80), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_rows_hold_every_example_once_and_fit(sizes: list[tuple[int, int]], seed: int) -> None:
    lengths = np.array(sizes)
    rows = list(fill_rows(lengths, np.random.default_rng(seed).permutation(len(sizes)), (20, 10)))
    assert sorted(example for row in rows for example in row) == list(range(len(sizes)))
    totals = [lengths[row].sum(axis=0) for row in rows]
    assert all((total <= (20, 10)).all() for total in totals)
    # First fit: no two rows could be one, as long as none had to be closed.
    assert all((a + b > (20, 10)).any() for i, a in enumerate(totals) for b in totals[:i])


def test_rows_are_closed_when_too_many_are_open() -> None:
    lengths = np.array([[15, 1]] * 300 + [[5, 1]] * 300)
    rows = list(fill_rows(lengths, np.arange(600), (20, 10)))
    assert sorted(example for row in rows for example in row) == list(range(600))
    # 236 are closed half empty; 64 are filled up, and what is left then fits four to a row.
    assert [row for row in rows if len(row) == 1] == [[number] for number in range(236)]
    assert len(rows) == 236 + 64 + 59


@pytest.mark.parametrize("vocabulary", [METRO_IDS, T5_IDS], ids=["metro", "t5"])
def test_a_packed_microbatch_restated(vocabulary) -> None:
    """One row after the other in plain lists; a full row, one of three examples, one with padding."""
    examples = draw_examples(vocabulary, seed=4, count=6)
    batch = make_batch(group(examples, (3, 1, 2)), (32, 24), vocabulary, is_packed=True)
    check_contract(batch, vocabulary.pad_id)
    assert batch.encoder_segments is not None and batch.decoder_segments is not None
    start = 0 if vocabulary.is_t5 else 2
    for row, members in enumerate(group(examples, (3, 1, 2))):
        source = [token for source, _ in members for token in source]
        target = [token for _, target in members for token in target]
        read = [token for _, target in members for token in [start, *target[:-1]]]
        assert batch.encoder_tokens[row].tolist() == source + [vocabulary.pad_id] * (32 - len(source))
        assert batch.decoder_tokens[row].tolist() == read + [vocabulary.pad_id] * (24 - len(read))
        assert batch.target_ids[row].tolist() == target + [vocabulary.pad_id] * (24 - len(target))
        assert batch.target_slots[row].tolist() == [*range(len(target)), *[24] * (24 - len(target))]
        numbers = [number for number, (source, _) in enumerate(members) for _ in source]
        assert batch.encoder_segments[row].tolist() == numbers + [-1] * (32 - len(numbers))
        numbers = [number for number, (_, target) in enumerate(members) for _ in target]
        assert batch.decoder_segments[row].tolist() == numbers + [len(members) - 1] * (24 - len(numbers))


def test_flags_of_pairs_are_for_pairs() -> None:
    base = "--preset metro-tiny"
    for words, flag in (
        ("--pack-examples", "--pack-examples"),
        ("--truncate-source --objective t5-span", "--truncate-source"),
        ("--objective text-to-text --decoder-seq-length 1", "--decoder-seq-length 1"),
        ("--objective text-to-text --block-mode complete_doc", "--block-mode"),
        ("--objective text-to-text --mask-prob-schedule 0:0.1,10:0.2", "--mask-prob-schedule"),
    ):
        with pytest.raises(ConfigError, match=flag):
            parse_run(f"{base} {words}".split(), 1)
    run = parse_run(f"{base} --objective text-to-text --encoder-seq-length 48 --decoder-seq-length 16".split(), 1)
    assert (run.data.encoder_seq_length, run.data.decoder_seq_length, run.model.generator_num_layers) == (48, 16, 0)
    assert parse_run(f"{base} --objective text-to-text".split(), 1).data.decoder_seq_length == 128

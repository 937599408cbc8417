"""Samples of a run: blends, epochs, packing, resuming at another layout, workers and their deaths."""

import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_metro.batch import Microbatch
from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.objectives import OBJECTIVES, PRETRAINING
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.loader import StepLoader, build_loaders
from megatron_metro.data.mixture import assign_samples
from megatron_metro.data.workers import WorkerDied
from tests.helpers.corpus import Corpus, make_config


def build(config: RunConfig, corpus: Corpus, dp_rank: int = 0, dp_size: int = 1) -> StepLoader:
    return build_loaders(config, corpus.tokenizer, dp_rank, dp_size)[0]


def join(microbatches: list[Microbatch]) -> dict[str, torch.Tensor]:
    return {
        field.name: torch.cat([getattr(microbatch, field.name) for microbatch in microbatches])
        for field in fields(Microbatch)
        if getattr(microbatches[0], field.name) is not None
    }


def assert_same(first: list[Microbatch], second: list[Microbatch]) -> None:
    values = join(first), join(second)
    assert values[0].keys() == values[1].keys()
    for name in values[0]:
        assert torch.equal(values[0][name], values[1][name]), name


@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6),
    start=st.integers(0, 10**9),
    count=st.integers(1, 200),
)
@settings(max_examples=100, deadline=None)
def test_any_range_of_a_blend_is_part_of_one_sequence(weights, start, count):
    weights = [weight / sum(weights) for weight in weights]
    sources, ordinals = assign_samples(weights, start, start + count)
    assert len(sources) == count
    again = [assign_samples(weights, i, i + 1) for i in range(start, start + count, 37)]
    assert [int(source[0]) for source, _ in again] == sources[::37].tolist()
    assert [int(ordinal[0]) for _, ordinal in again] == ordinals[::37].tolist()
    for source, weight in enumerate(weights):
        found = ordinals[sources == source]
        assert np.array_equal(found, found[0] + np.arange(len(found))) if len(found) else True
        if len(found):
            assert abs(found[-1] + 1 - weight * (start + count)) <= len(weights) + 1


def test_blend_proportions_and_counts():
    weights = [0.3, 0.5, 0.2]
    sources, ordinals = assign_samples(weights, 0, 10_000)
    assert np.bincount(sources).tolist() == [3000, 5000, 2000]
    for count in (1, 7, 100, 9999):
        so_far = np.bincount(sources[:count], minlength=3)
        assert np.abs(so_far - np.array(weights) * count).max() <= 1
    for source in range(3):
        assert np.array_equal(ordinals[sources == source], np.arange(np.sum(sources == source)))


def test_microbatches_have_the_promised_shapes(corpus):
    for objective in PRETRAINING:
        loader = build(make_config(corpus.prefix, objective=objective), corpus)
        for microbatch in loader.next_step(3):
            assert microbatch.shape == loader.objective.shape(4)
        assert loader.consumed_samples == 12


@pytest.mark.parametrize("read_ahead", [1, 7, 64])
def test_reading_ahead_changes_nothing(corpus, monkeypatch, read_ahead):
    """Steps of changing size, and a rewind into what was read already."""
    config = make_config(corpus.prefix, micro_batch_size=2)
    steps = [(0, 3), (6, 1), (8, 40), (88, 1), (6, 2), (10, 1), (6, 2)]

    def read() -> list[torch.Tensor]:
        loader, found = build(config, corpus), []
        for consumed, num_microbatches in steps:
            if loader.consumed_samples != consumed:
                loader.rewind(consumed)
            found.append(torch.cat([batch.generator_tokens for batch in loader.next_step(num_microbatches)]))
        return found

    expected = read()
    monkeypatch.setattr("megatron_metro.data.loader.READ_AHEAD_BLOCKS", read_ahead)
    assert all(torch.equal(*pair) for pair in zip(read(), expected, strict=True))
    assert torch.equal(expected[4], expected[6])


def test_full_blocks_are_the_stream(corpus):
    """Every block is <s> and a stretch of the stream; an epoch holds each token at most once, and misses few."""
    config = make_config(corpus.prefix, split="100,0,0", micro_batch_size=1)
    loader = build(config, corpus)
    source = loader.mixture.sources[0]
    stored = source.documents.store.tokens
    ring = np.concatenate([stored, stored])
    num_blocks = source.packing.num_blocks
    assert num_blocks == len(stored) // 31
    for epoch in (0, 1):
        blocks = source.read(np.arange(num_blocks) + epoch * num_blocks)
        starts, _ = source.packing.locate(epoch, blocks.keys.block)
        assert (blocks.tokens[:, 0] == 0).all()
        for tokens, start in zip(blocks.tokens, starts):
            assert np.array_equal(tokens[1:], ring[start : start + 31])
        covered = np.unique((starts[:, None] + np.arange(31)) % len(stored))
        assert len(covered) == num_blocks * 31
        assert sorted(blocks.keys.block.tolist()) == list(range(num_blocks))
        assert (blocks.keys.epoch == epoch).all()


def test_epochs_roll_over_within_a_step(corpus):
    loader = build(make_config(corpus.prefix), corpus)
    source = loader.mixture.sources[0]
    num_blocks = source.packing.num_blocks
    blocks = source.read(np.arange(num_blocks - 3, num_blocks + 3))
    assert blocks.keys.epoch.tolist() == [0, 0, 0, 1, 1, 1]
    last = source.read(np.arange(num_blocks - 3, num_blocks))
    assert np.array_equal(blocks.tokens[:3], last.tokens)


def test_training_and_validation_share_no_token(corpus):
    train, valid = build_loaders(make_config(corpus.prefix), corpus.tokenizer, 0, 1)
    ranges = [loader.mixture.sources[0].documents for loader in (train, valid)]
    assert (ranges[0].start, ranges[0].stop, ranges[1].start, ranges[1].stop) == (0, 96, 96, 120)
    first = valid.next_step(2)
    valid.rewind(0)
    assert_same(first, valid.next_step(2))


@pytest.mark.parametrize("objective", PRETRAINING)
def test_layout_and_resuming_change_nothing(corpus, objective):
    """Steps of 24 samples: one rank, then three ranks, then six ranks with another microbatch size."""
    blend = ("30", corpus.prefix, "70", corpus.lines_prefix)
    single = build(make_config(*blend, objective=objective), corpus)
    steps = [join(single.next_step(6)) for _ in range(3)]
    for dp_size, micro_batch_size in ((3, 4), (6, 2), (2, 3)):
        config = make_config(*blend, micro_batch_size=micro_batch_size, objective=objective)
        loaders = [build(config, corpus, rank, dp_size) for rank in range(dp_size)]
        num_microbatches = 24 // (dp_size * micro_batch_size)
        for loader in loaders:
            loader.rewind(24)
        for step in steps[1:]:
            parts = [loader.next_step(num_microbatches) for loader in loaders]
            ordered = [parts[rank][j] for j in range(num_microbatches) for rank in range(dp_size)]
            joined = join(ordered)
            for name in step:
                assert torch.equal(step[name], joined[name]), name


def test_seed_and_place_in_a_blend_change_masks(corpus):
    config = make_config(corpus.prefix)
    other = replace(config, training=replace(config.training, seed=1))
    first, second = (build(c, corpus).next_step(1)[0] for c in (config, other))
    assert not torch.equal(first.encoder_tokens, second.encoder_tokens)
    twice = build(make_config("1", corpus.prefix, "1", corpus.prefix), corpus)
    assert len({source.identity for source in twice.mixture.sources}) == 2
    assert [source.documents.store.content_sha256 for source in twice.mixture.sources] == [
        twice.mixture.sources[0].documents.store.content_sha256
    ] * 2


def read_lines(corpus: Corpus) -> list[list[list[int]]]:
    """Ids of each line of each document."""
    return [
        [[*corpus.tokenizer.encode(line), 2] for line in text.split("\n") if corpus.tokenizer.encode(line)]
        for text in corpus.texts
    ]


def pack_greedily(lines: list[list[int]], limit: int) -> list[list[list[int]]]:
    """The reference's rule, one document at a time."""
    blocks: list[list[list[int]]] = [[]]
    for line in lines:
        if blocks[-1] and sum(map(len, blocks[-1])) + min(len(line), limit) > limit:
            blocks.append([])
        blocks[-1].append(line)
    return [block for block in blocks if sum(map(len, block)) > 1]


@pytest.mark.parametrize("sequence_length", [16, 64, 200])
def test_complete_doc_blocks_are_the_references(corpus, sequence_length):
    limit = sequence_length - 1
    config = make_config(
        corpus.lines_prefix, block_mode="complete_doc", sequence_length=sequence_length, split="50,50,0"
    )
    train, valid = build_loaders(config, corpus.tokenizer, 0, 1)
    documents = read_lines(corpus)
    for loader, part, is_training in ((train, documents[:60], True), (valid, documents[60:], False)):
        expected = [block for lines in part for block in pack_greedily(lines, limit)]
        if not is_training:
            expected = [block for block in expected if sum(map(len, block)) <= limit]
        source = loader.mixture.sources[0]
        assert source.packing.num_blocks == len(expected)
        blocks = source.read(np.arange(len(expected)))
        for tokens, length, number in zip(blocks.tokens, blocks.lengths, blocks.keys.block):
            wanted = [token for line in expected[number] for token in line]
            assert tokens[0] == 0
            assert (tokens[length:] == 1).all()
            body = tokens[1:length].tolist()
            if len(wanted) <= limit:
                assert body == wanted
            else:
                assert len(body) == limit
                starts = [i for i in range(len(wanted) - limit) if wanted[i : i + limit] == body]
                assert starts, "cropped lines never keep their last token"
    batch = train.next_step(2)[0]
    assert batch.encoder_padding is not None
    assert torch.equal(batch.encoder_padding, batch.encoder_tokens == 1)


def test_complete_doc_needs_lines(corpus):
    with pytest.raises(DataError, match="--split-lines"):
        build(make_config(corpus.prefix, block_mode="complete_doc"), corpus)


def test_damaged_caches_are_built_again(corpus, tmp_path):
    config = make_config(corpus.lines_prefix, block_mode="complete_doc", cache_path=str(tmp_path))
    expected = build(config, corpus).next_step(1)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2  # training and validation
    whole = files[0].read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + b"\x55"):
        files[0].write_bytes(content)
        assert_same(expected, build(config, corpus).next_step(1))
        assert files[0].read_bytes() == whole
    other = replace(config, training=replace(config.training, seed=9))
    build(other, corpus)
    assert len(list(tmp_path.iterdir())) == 4


def test_errors_name_flag_and_file(corpus):
    cases = (
        (make_config("absent"), DataError, "absent.idx is missing"),
        (make_config(corpus.prefix, "0.5"), ConfigError, "--data-path"),
        (make_config(), ConfigError, "--data-path"),
        (make_config(corpus.prefix, split="100"), ConfigError, "--split"),
        (make_config(corpus.prefix, sequence_length=100_000), DataError, "tokens, a block needs 99999"),
        (make_config(corpus.prefix, split="1000,1,0"), DataError, "0 documents of this split"),
    )
    for config, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            build(config, corpus)
        assert "\n" not in str(caught.value)
    no_validation = replace(make_config(corpus.prefix, split="1,0,0"))
    assert build_loaders(no_validation, corpus.tokenizer, 0, 1)[1] is None


def test_workers_give_the_same_steps_and_their_death_is_noticed(corpus):
    plain = build(make_config(corpus.prefix), corpus)
    loader = build(make_config(corpus.prefix, num_workers=2), corpus)
    try:
        for num_microbatches in (2, 2, 2, 3, 3, 1):
            assert_same(plain.next_step(num_microbatches), loader.next_step(num_microbatches))
        plain.rewind(4)
        loader.rewind(4)
        assert_same(plain.next_step(2), loader.next_step(2))
        pids = loader._pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=rf"data worker \d \(pid ({pids[0]}|{pids[1]})\) was killed by SIGKILL"):
            for _ in range(3):
                loader.next_step(2)
    finally:
        loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_damage_found_while_reading_is_named(corpus, tmp_path):
    """Ids between the checked ends of a file are checked when they are read."""
    loader = build(make_config(corpus.prefix), corpus)
    source = loader.mixture.sources[0]
    tokens = source.documents.store.tokens.copy()
    tokens[len(tokens) // 2] = 60_000
    broken = replace(source, documents=replace(source.documents, store=replace(source.documents.store, tokens=tokens)))
    with pytest.raises(DataError, match="holds id 60000"):
        broken.read(np.arange(source.packing.num_blocks))


SCHEDULE = "0:0.05,4:0.4"


def count_masked(microbatches: list[Microbatch]) -> float:
    return float(torch.cat([microbatch.masked_valid.sum(1) for microbatch in microbatches]).double().mean())


SCHEDULED = {name: "mask_prob" for name, needs in OBJECTIVES.items() if needs.mask_prob == "free"}


def list_real(microbatches: list[Microbatch]) -> dict[str, torch.Tensor]:
    """What does not depend on the number of slots: texts, and the ids of slots in use."""
    values = join(microbatches)
    names = ("encoder_tokens", "generator_tokens")
    found = {name: values[name] for name in names if name in values}
    for kind in ("target", "masked"):
        if f"{kind}_ids" in values:
            found[kind] = values[f"{kind}_ids"][values[f"{kind}_valid"]]
    return found


@pytest.mark.parametrize(("name", "rate"), [*SCHEDULED.items(), ("spactor", "spactor_mask_prob")])
def test_masking_rates_follow_their_schedule_in_static_slots(corpus, name, rate):
    """Each step is that of a run at its constant rate."""
    plain = make_config(corpus.prefix, objective=name)
    plain = replace(plain, training=replace(plain.training, global_batch_size=16))
    config = replace(plain, objective=replace(plain.objective, **{f"{rate}_schedule": SCHEDULE}))
    loader = build(config, corpus)
    steps = [loader.next_step(4) for _ in range(6)]
    sums = []
    for step, microbatches in enumerate(steps):
        assert all(microbatch.shape == loader.objective.shape(4) for microbatch in microbatches)
        value = 0.05 + (0.4 - 0.05) * min(step / 4, 1.0)
        constant = build(replace(plain, objective=replace(plain.objective, **{rate: value})), corpus)
        constant.rewind(step * 16)
        found, expected = list_real(microbatches), list_real(constant.next_step(4))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), step
        sums.append(int(join(microbatches)["encoder_tokens"].sum()) + len(found.get("masked", ())))
    assert len(set(sums)) == 6  # steps differ
    loader.rewind(3 * 16)
    assert_same(loader.next_step(4), steps[3])


def test_workers_follow_the_schedule_too(corpus):
    config = make_config(corpus.prefix)
    config = replace(config, objective=replace(config.objective, mask_prob_schedule=SCHEDULE))
    config = replace(config, training=replace(config.training, global_batch_size=16))
    loader = build(config, corpus)
    with_workers = build(replace(config, data=replace(config.data, num_workers=2)), corpus)
    try:
        for _ in range(6):
            assert_same(with_workers.next_step(4), loader.next_step(4))
    finally:
        with_workers.close()


def test_validation_keeps_its_masking_rate(corpus):
    plain = make_config(corpus.prefix)
    scheduled = replace(plain, objective=replace(plain.objective, mask_prob_schedule="0:0.4"))
    batches = []
    for config in (plain, scheduled):
        loader = build_loaders(config, corpus.tokenizer, 0, 1)[1]
        assert loader is not None
        batches.append(loader.next_step(2))
    assert count_masked(batches[0]) == count_masked(batches[1])

"""What a batch tells of its text, whatever was drawn: nothing is lost, sentinels come in order, counts are right."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_metro.batch import Microbatch
from megatron_metro.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Told:
    """One row of a batch, and the text it was made of."""

    source: list[int]
    target: list[int]
    text: list[int]
    vocabulary: Vocabulary
    num_noise: int  # the T5 library's rounded share, at least one and not all
    writes_all: bool  # --lm-targets all
    is_full: bool  # the source fills the encoder, so that what came after is cut off

    def without_ends(self) -> tuple[list[int], list[int]]:
        """Both sides without the </s> that ends them."""
        assert self.source[-1] == self.target[-1] == self.vocabulary.eos_id
        return self.source[:-1], self.target[:-1]


def check_properties(
    name: str, lm_targets: str, vocabulary: Vocabulary, batch: Microbatch, row: int, text: list[int], rate: float
) -> None:
    """One row of a batch against the text it was made of."""
    source, target = read_sides(batch, row)
    if batch.generator_tokens is not None:
        fill_back(batch, row, source)
        assert name == "spactor" or source == text
    told = Told(
        source=source,
        target=target,
        text=text,
        vocabulary=vocabulary,
        num_noise=min(max(round(len(text) * rate), 1), len(text) - 1),
        writes_all=lm_targets == "all",
        is_full=len(source) == batch.shape.encoder_length,
    )
    PROPERTIES[name](told)


def check_masks(told: Told) -> None:
    """Without a generator the masked tokens are in the target, in order."""
    assert told.target == told.text if told.writes_all else is_part(told.target, told.text)
    assert len(told.source) == len(told.text)


def check_spans(told: Told) -> None:
    source, target = told.without_ends()
    assert join_spans(source, target, told.vocabulary) == told.text
    assert sum(token < told.vocabulary.num_pieces for token in target) == told.num_noise


def check_runs(told: Told) -> None:
    """A final sentinel, which stands for nothing, ends the target: as if it stood at the end of the source too."""
    source, target = told.without_ends()
    check_spans(replace(told, source=[*source, target[-1], told.vocabulary.eos_id]))


def check_metro_spans(told: Told) -> None:
    if told.writes_all:
        assert told.target == told.text
        return
    vocabulary = told.vocabulary
    assert told.target[-1] == (vocabulary.eos_id if vocabulary.is_t5 else vocabulary.sentinel_ids[0])
    found = join_spans(told.source, told.target[:-1], vocabulary, is_cut=told.is_full)
    assert found == told.text[: len(found)] and (len(found) == len(told.text) or told.is_full)


def check_dropped(told: Told) -> None:
    source, target = told.without_ends()
    assert Counter(source) + Counter(target) == Counter(told.text) and len(target) == told.num_noise
    assert is_part(source, told.text) and is_part(target, told.text)


def check_random(told: Told) -> None:
    source, target = told.without_ends()
    changed = sum(a != b for a, b in zip(source, told.text, strict=True))
    assert target == told.text and changed <= told.num_noise


def check_masked(told: Told) -> None:
    source, target = told.without_ends()
    changed = [a for a, b in zip(source, told.text, strict=True) if a != b]
    assert target == told.text and changed == [told.vocabulary.masked_id] * told.num_noise


def check_split(told: Told) -> None:
    source, target = told.without_ends()
    assert source and target and source + target == told.text


def check_shuffled(told: Told) -> None:
    source, target = told.without_ends()
    assert target == told.text and Counter(source) == Counter(told.text)


PROPERTIES: dict[str, Callable[[Told], None]] = {
    "metro": check_masks,
    "electra": check_masks,
    "spactor": check_spans,
    "t5-span": check_spans,
    "t5-iid": check_runs,
    "t5-metro": check_metro_spans,
    "drop-tokens": check_dropped,
    "bert-style": check_random,
    "mass-style": check_masked,
    "prefix-lm": check_split,
    "deshuffle": check_shuffled,
}


def read_sides(batch: Microbatch, row: int) -> tuple[list[int], list[int]]:
    """What the encoder reads and what is written, without padding."""
    tokens = batch.encoder_tokens[row]
    source = tokens if batch.encoder_padding is None else tokens[~batch.encoder_padding[row]]
    return source.tolist(), batch.target_ids[row][batch.target_valid[row]].tolist()


def fill_back(batch: Microbatch, row: int, source: list[int]) -> None:
    """The generator's text with the originals in its slots is the encoder's."""
    assert batch.generator_tokens is not None and batch.masked_valid is not None
    assert batch.masked_slots is not None and batch.masked_ids is not None
    valid, seen = batch.masked_valid[row], batch.generator_tokens[row].tolist()[: len(source)]
    for slot, token in zip(batch.masked_slots[row][valid].tolist(), batch.masked_ids[row][valid].tolist()):
        seen[slot] = token
    assert seen == source


def join_spans(source: Sequence[int], target: Sequence[int], vocabulary: Vocabulary, is_cut: bool = False) -> list[int]:
    """The text, from sentinels that are the vocabulary's first ones in order on both sides; `is_cut`: source may be."""
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in target:
        if token >= vocabulary.num_pieces:
            span = spans[token] = []
        else:
            span.append(token)
    first = list(vocabulary.span_sentinel_ids)
    marks = [token for token in source if token >= vocabulary.num_pieces]
    assert list(spans) == first[: len(spans)] and marks == first[: len(marks)]
    assert is_cut or len(marks) == len(spans)

    def walk() -> Iterator[int]:
        for token in source:
            yield from spans[token] if token >= vocabulary.num_pieces else (token,)

    return list(walk())


def is_part(part: Sequence[int], text: Sequence[int]) -> bool:
    """Whether the first stands in the second in order, with gaps."""
    rest = iter(text)
    return all(token in rest for token in part)

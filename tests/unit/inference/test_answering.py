"""Requests as JSON lines, the file of answers and its resumption, and the conversation at a terminal."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_metro.config.errors import ConfigError, DataError
from megatron_metro.config.schema import RunConfig
from megatron_metro.inference.answering import Answerer, answer_file, converse
from megatron_metro.inference.answers import AnswerFile
from megatron_metro.inference.options import WritingIds, WritingOptions
from megatron_metro.inference.pipeline import EncoderDecoder, pad_sources
from megatron_metro.inference.requests import Mode, Reader
from megatron_metro.inference.writing import write
from megatron_metro.parallel.groups import ParallelGroups
from megatron_metro.tokenizer import NullTokenizer, Vocabulary
from tests.helpers import tiny
from tests.helpers.generation import METRO_IDS, Texts, build_model

TOKENIZER = NullTokenizer(tiny.VOCAB_SIZE - 8, 8)
OPTIONS = WritingOptions(decoding="sample", max_new_tokens=6)
SOURCES = ["20 30 40", "7 8 9 10 11", "99", "100 101 7", "250 6 6 6"]


def make_answerer(groups: ParallelGroups, mode: Mode = "write", options: WritingOptions = OPTIONS) -> Answerer:
    model = build_model(Texts(model={}, options=options, ids=METRO_IDS), groups)
    reader = Reader(tokenizer=TOKENIZER, mode=mode, max_length=32)
    return Answerer(
        open_model=lambda: model, groups=groups, tokenizer=TOKENIZER, ids=METRO_IDS, options=options, reader=reader
    )


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_answered_in_order_with_its_other_keys(groups: ParallelGroups, tmp_path: Path) -> None:
    answerer = make_answerer(groups)
    source = write_lines(tmp_path / "in.jsonl", *({"source": text, "id": n} for n, text in enumerate(SOURCES)))
    output = tmp_path / "new" / "out.jsonl"
    assert answer_file(answerer, RunConfig(), source, output, batch_size=2) == 5
    answers = read_lines(output)
    assert [(answer["id"], answer["source"]) for answer in answers] == list(enumerate(SOURCES))
    # METRO's source is <s> text </s>; the uniforms are those of the line.
    ids = [[0, *map(int, text.split()), 2] for text in SOURCES]
    texts = write(answerer.model, pad_sources(ids, 1, answerer.model.device), METRO_IDS, OPTIONS, range(5))
    assert [answer["output"] for answer in answers] == [TOKENIZER.decode(text.ids) for text in texts]
    assert [answer["score"] for answer in answers] == pytest.approx([text.score for text in texts])
    assert list(output.parent.iterdir()) == [output]


def test_ids_are_taken_as_they_are_and_answered_with_ids(groups: ParallelGroups, tmp_path: Path) -> None:
    answerer = make_answerer(groups)
    source = write_lines(tmp_path / "in.jsonl", {"source": "20 30 40"}, {"source": [0, 20, 30, 40, 2]})
    answer_file(make_answerer(groups, options=WritingOptions(max_new_tokens=6)), RunConfig(), source, tmp_path / "o", 2)
    text, ids = read_lines(tmp_path / "o")
    assert TOKENIZER.decode(ids["output"]) == text["output"] and ids["score"] == text["score"]
    assert answerer.ids.start == 2


def test_targets_are_scored(groups: ParallelGroups, tmp_path: Path) -> None:
    answerer = make_answerer(groups, "score")
    source = write_lines(
        tmp_path / "in.jsonl", {"source": "20 30", "choices": ["7 8", "9"]}, {"source": "20 30", "target": "9"}
    )
    answer_file(answerer, RunConfig(), source, tmp_path / "out.jsonl", 8)
    both, one = read_lines(tmp_path / "out.jsonl")
    assert len(both["log_probs"]) == 2 and both["log_probs"][1] == pytest.approx(one["log_probs"][0])


def test_an_attempt_that_was_cut_short_is_gone_on_with(
    groups: ParallelGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"source": text} for text in SOURCES))
    answerer = make_answerer(groups)
    answer_file(answerer, RunConfig(), source, tmp_path / "whole", 5)
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    append, calls = AnswerFile.append, []

    def fail_at_third(self: AnswerFile, lines: list[str]) -> None:
        calls.append(len(lines))
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, lines)

    monkeypatch.setattr(AnswerFile, "append", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        answer_file(answerer, RunConfig(), source, output, 1)
    assert not output.exists() and len(partial.read_text().splitlines()) == 3  # what job it is, and two answers
    monkeypatch.undo()
    with partial.open("a") as file:
        file.write('{"source": "99", "outp')  # a line that was being written
    reads: list[int] = []
    read = EncoderDecoder.read
    monkeypatch.setattr(
        EncoderDecoder, "read", lambda self, batch: reads.append(len(batch.tokens)) or read(self, batch)
    )
    assert answer_file(answerer, RunConfig(), source, output, 2) == 5  # in other batches
    assert reads == [2, 1]
    assert [a["output"] for a in read_lines(output)] == [a["output"] for a in read_lines(tmp_path / "whole")]
    assert not partial.exists()


def test_another_jobs_answers_are_left_alone(groups: ParallelGroups, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"source": "20"})
    (tmp_path / "out.partial").write_text('{"another": "job"}\n{"source": "20"}\n')
    with pytest.raises(DataError, match=r"out\.partial: was begun with another input"):
        answer_file(make_answerer(groups), RunConfig(), source, tmp_path / "out", 1)
    (tmp_path / "out.partial").unlink()
    answer_file(make_answerer(groups), RunConfig(), source, tmp_path / "out", 1)
    with pytest.raises(ConfigError, match="exists already"):
        answer_file(make_answerer(groups), RunConfig(), source, tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("mode", "line", "words"),
    [
        ("write", "{", "in:1: is not JSON"),
        ("write", "[]", 'in:1: has no "source"'),
        ("write", '{"target": "7"}', 'in:1: has no "source"'),
        ("write", '{"source": 7}', "neither text nor a list of ids below 300"),
        ("write", '{"source": []}', "neither text nor a list"),
        ("write", '{"source": [300]}', "neither text nor a list"),
        ("write", '{"source": [true]}', "neither text nor a list"),
        ("write", json.dumps({"source": [7] * 33}), "the source has 33 tokens, the model has 32 positions"),
        ("score", '{"source": "7"}', 'neither "choices", a list, nor "target"'),
        ("score", '{"source": "7", "choices": []}', "neither"),
        ("score", json.dumps({"source": "7", "choices": ["8", "9 " * 32]}), "a target has 33 tokens"),
    ],
)
def test_lines_that_are_no_requests(mode: Mode, line: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        Reader(tokenizer=TOKENIZER, mode=mode, max_length=32).read([line], "in")
    assert words in str(caught.value)


def test_t5_frames_sources_without_a_beginning_and_starts_with_pad() -> None:
    tokenizer = NullTokenizer(292, 8)
    tokenizer.vocabulary = Vocabulary.t5(292, 8)
    request = Reader(tokenizer=tokenizer, mode="score", max_length=None).read_line(
        '{"source": "7 8", "target": "9"}', 0, "x"
    )
    assert (request.source, request.choices) == ([7, 8, 1], [[9, 1]])
    assert WritingIds.of(tokenizer.vocabulary) == WritingIds(start=0, end=1, pad=0)
    assert WritingIds.of(TOKENIZER.vocabulary) == WritingIds(start=2, end=2, pad=1)
    assert WritingIds.of(TOKENIZER.vocabulary, "sentinel").start == 292


def test_a_conversation_goes_on_after_a_bad_line(groups: ParallelGroups) -> None:
    answerer = replace(make_answerer(groups), options=WritingOptions(max_new_tokens=3))
    output = io.StringIO()
    converse(answerer, io.StringIO('20 30\n\n{"source": 5}\n{"source": [0, 20, 30, 2]}\n'), output)
    first, second, third = output.getvalue().splitlines()
    assert second.startswith("error: this line: the source is neither")
    assert json.loads(first)["output"] == TOKENIZER.decode(json.loads(third)["output"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 2}, "--num-beams has no use in --decoding greedy"),
        ({"decoding": "beam", "top_k": 3}, "--top-k has no use in --decoding beam"),
        ({"decoding": "sample", "temperature": 0.0}, "--temperature 0.0"),
        ({"decoding": "sample", "top_p": 0.0}, "--top-p 0.0"),
    ],
)
def test_options_that_leave_no_choice(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WritingOptions(**changes)

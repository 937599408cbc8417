"""Cut text into documents, drop repeated paragraphs, hold out every tenth document, write both parts as JSON lines.

Without --text it takes the documentation of the Python language inside every CPython (`pydoc_data.topics`).
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data import topics

DOCUMENT_CHARACTERS = 2_000
HELD_OUT_EVERY = 10
MIN_CHARACTERS = 50_000
MAX_CHARACTERS = 20_000_000


def read_texts(source: Path | None) -> Iterator[str]:
    """The texts of a file or of all files below a folder; whatever is not UTF-8 text is passed over."""
    if source is None:
        yield from (topics.topics[name] for name in sorted(topics.topics))
        return
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            content = path.read_bytes()
            try:
                if b"\0" not in content:
                    yield content.decode("utf-8")
            except UnicodeDecodeError:
                continue


def cut_documents(texts: Iterable[str]) -> Iterator[str]:
    """Runs of whole paragraphs of about DOCUMENT_CHARACTERS; a paragraph seen before, in any text, is left out.

    Repeated paragraphs would otherwise stand in the training and in the held-out part.
    """
    seen: set[str] = set()
    for text in texts:
        paragraphs: list[str] = []
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
            if sum(map(len, paragraphs)) >= DOCUMENT_CHARACTERS:
                yield "\n\n".join(paragraphs)
                paragraphs = []
        if paragraphs:
            yield "\n\n".join(paragraphs)


def take_characters(documents: Iterable[str], limit: int) -> list[str]:
    """The first documents, until they hold `limit` characters."""
    taken: list[str] = []
    for document in documents:
        if limit <= 0:
            print(f"using the first {MAX_CHARACTERS:,} characters only: this is a quick start")
            break
        taken.append(document)
        limit -= len(document)
    return taken


def write_json_lines(path: Path, documents: list[str]) -> None:
    """One object with the key `text` per document."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    print(f"{path}: {len(documents)} documents, {sum(map(len, documents)):,} characters")


def main() -> None:
    """Write OUTPUT_FOLDER/train.jsonl and OUTPUT_FOLDER/valid.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="text file, or folder of text files")
    parser.add_argument("--output-folder", type=Path, required=True)
    options = parser.parse_args()
    if options.text is not None and not options.text.exists():
        sys.exit(f"--text {options.text} does not exist: give a text file or a folder of text files")
    documents = take_characters(cut_documents(read_texts(options.text)), MAX_CHARACTERS)
    num_characters = sum(map(len, documents))
    if num_characters < MIN_CHARACTERS:
        sys.exit(
            f"--text {options.text} holds {num_characters:,} characters of UTF-8 text without repeated paragraphs; "
            f"training and held-out text together need at least {MIN_CHARACTERS:,}"
        )
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    options.output_folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(options.output_folder / "train.jsonl", training)
    write_json_lines(options.output_folder / "valid.jsonl", held_out)


if __name__ == "__main__":
    main()

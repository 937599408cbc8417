"""Load a checkpoint, saved at any layout, into this one process and show what the model makes of held-out blocks."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from megatron_metro.config.cli import load_config
from megatron_metro.config.errors import ConfigError, exit_on_error
from megatron_metro.config.schema import ParallelConfig, RunConfig
from megatron_metro.conversion.whole_model import load_model
from megatron_metro.data.loader import build_loaders
from megatron_metro.inference.restore import Restoration, count_repaired, restore_blocks
from megatron_metro.tokenizer import Tokenizer, load_tokenizer

SURE_REPLACED = 0.5


def read_run(folder: Path, num_blocks: int) -> RunConfig:
    """The saved run's configuration, for one process and one microbatch of so many blocks."""
    run = load_config(folder / "config.yaml")
    if not run.model.has_rtd_head:
        raise ConfigError(f"{folder} holds a model without generator or RTD head; give the folder of a METRO run")
    return replace(
        run,
        parallel=ParallelConfig(),
        data=replace(run.data, num_workers=0),
        training=replace(run.training, micro_batch_size=num_blocks, global_batch_size=num_blocks, eval_iters=1),
    )


def restore_held_out(folder: Path, run: RunConfig, tokenizer: Tokenizer) -> list[Restoration]:
    """The first held-out blocks through the saved model, each once."""
    _, loader = build_loaders(run, tokenizer, dp_rank=0, dp_size=1)
    if loader is None:
        raise ConfigError(f"{folder}: the run held out no text; train with --valid-data-path")
    num_distinct = sum(source.num_blocks for source in loader.mixture.sources)
    [microbatch] = loader.next_step(1)
    piece = load_model(folder, tokenizer=tokenizer, device=run.training.device)
    return restore_blocks(piece, microbatch.to(next(piece.parameters()).device))[:num_distinct]


def format_pieces(tokenizer: Tokenizer, ids: Sequence[int], mark: Callable[[int, str], str]) -> str:
    """Pieces as wrapped text; `mark(position, piece)` gives the form of one piece, without the blank before it."""
    words = []
    for position, token in enumerate(ids):
        piece = tokenizer.piece(token).replace("\u2581", " ")
        words.append((" " if piece.startswith(" ") else "") + mark(position, piece.strip()))
    return wrap("".join(words))


def wrap(text: str) -> str:
    """Indented lines of at most 100 characters."""
    return textwrap.fill(text, width=100, initial_indent="  ", subsequent_indent="  ")


def format_block(block: Restoration, tokenizer: Tokenizer) -> str:
    """Masked text, the generator's fill, the encoder's verdicts and the decoder's restoration of one block."""
    restored = dict(zip(block.masked_slots, block.restored_ids))
    written = [restored.get(position, token) for position, token in enumerate(block.original_ids)]

    def judge(ids: Sequence[int]) -> Callable[[int, str], str]:
        def mark(position: int, piece: str) -> str:
            if position not in restored:
                return piece
            text = piece or "_"  # a piece that is nothing but a blank
            return f"({text})" if ids[position] == block.original_ids[position] else f"[{text}]"

        return mark

    def hide(position: int, piece: str) -> str:
        return "____" if position in restored else piece

    return "\n".join(
        [
            "masked text:",
            format_pieces(tokenizer, block.original_ids, hide),
            "generator's fill, (the original) or [replaced]:",
            format_pieces(tokenizer, block.filled_ids, judge(block.filled_ids)),
            "RTD, probability of each replaced token to be replaced:",
            format_verdicts(block, tokenizer),
            "greedy restoration, (the original) or [another]:",
            format_pieces(tokenizer, written, judge(written)),
            f"corrupted positions restored: {len(block.repaired_slots)} of {len(block.replaced_slots)}",
        ]
    )


def format_verdicts(block: Restoration, tokenizer: Tokenizer) -> str:
    """The encoder's probability that each replaced token is replaced, and what it says of all others."""
    replaced = set(block.replaced_slots)
    others = [prob for position, prob in enumerate(block.replaced_probs) if position not in replaced]
    verdicts = []
    for position in block.replaced_slots:
        prob = block.replaced_probs[position]
        piece = tokenizer.piece(block.filled_ids[position]).replace("\u2581", "")
        verdicts.append(f"{piece or '_'} {prob:.2f} {'caught' if prob > SURE_REPLACED else 'missed'}")
    num_false = sum(prob > SURE_REPLACED for prob in others)
    verdicts.append(f"{num_false} false alarms among {len(others)} other tokens, {mean(others):.2f} on average")
    return wrap(", ".join(verdicts))


def rank_replaced(blocks: Sequence[Restoration]) -> float:
    """How often a replaced token gets a higher probability than another one: the area under RTD's ROC curve."""
    is_replaced = torch.tensor([i in block.replaced_slots for block in blocks for i in range(len(block.filled_ids))])
    probs = torch.tensor([prob for block in blocks for prob in block.replaced_probs], dtype=torch.float64)
    others = probs[~is_replaced].sort().values
    # Half of the pairs of equal probability count.
    below = torch.searchsorted(others, probs[is_replaced], right=False)
    not_above = torch.searchsorted(others, probs[is_replaced], right=True)
    return float((below + not_above).double().mean()) / (2 * max(1, len(others)))


def format_summary(blocks: Sequence[Restoration]) -> str:
    """What RTD and the decoder are worth over all blocks."""
    num_repaired, num_replaced = count_repaired(blocks)
    share, ranked = 100 * num_repaired / max(1, num_replaced), 100 * rank_replaced(blocks)
    return (
        f"in {len(blocks)} held-out blocks\n"
        f"RTD suspects a replaced token more than another in {ranked:.1f} % of pairs (its AUC; 50 % is chance)\n"
        f"corrupted positions restored: {num_repaired} of {num_replaced} ({share:.1f} %)"
    )


def main() -> None:
    """Print some blocks, then the share of corrupted positions restored in all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the --save folder of a METRO run")
    parser.add_argument("--num-blocks", type=int, default=64, help="held-out blocks to restore")
    parser.add_argument("--num-shown", type=int, default=3, help="how many of them to print")
    options = parser.parse_args()
    with exit_on_error():
        run = read_run(options.run, options.num_blocks)
        tokenizer = load_tokenizer(run.tokenizer, run.model.vocab_size)
        blocks = restore_held_out(options.run, run, tokenizer)
    for number, block in enumerate(blocks[: options.num_shown], 1):
        print(f"\n-- held-out block {number}\n{format_block(block, tokenizer)}")
    print(f"\n{format_summary(blocks)}")


if __name__ == "__main__":
    main()

"""Microbatches as text: what the generator sees, what the encoder reads, what the decoder must write, and how much."""

from collections.abc import Iterator

import torch

from megatron_metro.batch import Microbatch
from megatron_metro.data.loader import StepLoader
from megatron_metro.tokenizer import Tokenizer


def describe_samples(loader: StepLoader, tokenizer: Tokenizer, num_samples: int) -> Iterator[str]:
    """A few lines for each of the next samples, and the shares of all of them."""
    batches: list[Microbatch] = []
    shown = 0
    while shown < num_samples:
        batches += loader.next_step(1)
        for row in range(min(len(batches[-1].encoder_tokens), num_samples - shown)):
            yield f"--- sample {shown}"
            yield from _describe_row(batches[-1], row, tokenizer)
            shown += 1
    yield f"--- shares in {sum(len(batch.encoder_tokens) for batch in batches)} samples"
    yield from _describe_shares(batches, tokenizer)


def _describe_row(batch: Microbatch, row: int, tokenizer: Tokenizer) -> Iterator[str]:
    def show(tokens: torch.Tensor) -> str:
        ids = tokens.tolist()
        # Pad before the end means something: T5's decoder starts with it.
        end = max((i + 1 for i, token in enumerate(ids) if token != tokenizer.pad_id), default=0)
        return tokenizer.decode(ids[:end], show_special=True)

    if batch.generator_tokens is not None and batch.masked_slots is not None and batch.masked_valid is not None:
        yield f"generator sees:  {show(batch.generator_tokens[row])}"
        slots = set(batch.masked_slots[row][batch.masked_valid[row]].tolist())
        pieces = [tokenizer.piece(token) for token in batch.encoder_tokens[row].tolist() if token != tokenizer.pad_id]
        marked = " ".join(f"[{piece}]" if i in slots else piece for i, piece in enumerate(pieces))
        yield f"encoder reads, with the generator's token in each [slot]:  {marked}"
    else:
        yield f"encoder reads:   {show(batch.encoder_tokens[row])}"
    has_decoder = batch.decoder_tokens.shape[1] > 0
    if has_decoder:
        yield f"decoder reads:   {show(batch.decoder_tokens[row])}"
    valid = batch.target_valid[row]
    targets = zip(batch.target_slots[row][valid].tolist(), batch.target_ids[row][valid].tolist())
    yield ("decoder writes:  " if has_decoder else "encoder writes:  ") + " ".join(
        f"{slot}:{tokenizer.piece(token)}" for slot, token in targets
    )


def _describe_shares(batches: list[Microbatch], tokenizer: Tokenizer) -> Iterator[str]:
    tokens = torch.cat([batch.encoder_tokens for batch in batches])
    text = tokens[tokens != tokenizer.pad_id]
    yield f"padding: {1 - len(text) / tokens.numel():.2%} of positions"
    unknown, ends = ((text == token).double().mean() for token in (tokenizer.unk_id, tokenizer.eos_id))
    yield f"unknown: {unknown:.3%} of tokens, </s>: {ends:.3%}"
    yield f"targets: {sum(int(batch.target_valid.sum()) for batch in batches) / len(tokens):.2f} per sample"
    if batches[0].generator_tokens is None:
        return
    seen, original = (torch.cat(parts) for parts in zip(*map(_masked_tokens, batches)))
    mask_id = tokenizer.vocabulary.masked_id
    is_mask, is_kept = seen == mask_id, seen == original
    yield (
        f"masked: {len(seen) / len(text):.2%} of tokens, of which the generator sees {is_mask.double().mean():.1%} as "
        f"{tokenizer.piece(mask_id)}, {is_kept.double().mean():.1%} unchanged and "
        f"{(~is_mask & ~is_kept).double().mean():.1%} as another token"
    )


def _masked_tokens(batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the generator sees, what stood there) at all masked positions of a microbatch."""
    assert batch.generator_tokens is not None
    assert batch.masked_slots is not None
    assert batch.masked_ids is not None
    assert batch.masked_valid is not None
    last = batch.generator_tokens.shape[1] - 1
    seen = batch.generator_tokens.gather(1, batch.masked_slots.clamp(max=last))
    return seen[batch.masked_valid], batch.masked_ids[batch.masked_valid]

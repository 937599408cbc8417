"""Corrupt blocks with the generator, judge every token, and write the original text back.

Shape letters: b blocks, s positions, g masked slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.config.errors import ConfigError
from megatron_metro.config.schema import ObjectiveConfig
from megatron_metro.losses.step import StepLosses, count_tokens
from megatron_metro.model.piece import ChainPiece
from megatron_metro.model.slots import fill_slots, mark_real_positions
from megatron_metro.parallel.boundary import BoundaryPayload


@dataclass(frozen=True, kw_only=True, slots=True)
class Restoration:
    """One block without its padding: what it was, what the generator made of it, and what the main model says."""

    original_ids: tuple[int, ...]
    masked_slots: tuple[int, ...]  # positions the generator filled, ascending
    filled_ids: tuple[int, ...]  # the corrupted block that the encoder reads
    replaced_probs: tuple[
        float, ...
    ]  # RTD's, at every position, of a replacement; empty where the model has no RTD head
    restored_ids: tuple[int, ...]  # the decoder's tokens at the masked slots

    @property
    def replaced_slots(self) -> tuple[int, ...]:
        """Corrupted positions: masked ones whose fill is not the original token."""
        return tuple(i for i in self.masked_slots if self.filled_ids[i] != self.original_ids[i])

    @property
    def repaired_slots(self) -> tuple[int, ...]:
        """Corrupted positions where the decoder wrote the original token."""
        restored = dict(zip(self.masked_slots, self.restored_ids))
        return tuple(i for i in self.replaced_slots if restored[i] == self.original_ids[i])


@torch.no_grad()
def restore_blocks(piece: ChainPiece, microbatch: Microbatch) -> list[Restoration]:
    """Every block of a METRO or COCO-LM microbatch through a whole model held in one piece, dropout off.

    The generator's fills are drawn with the microbatch's uniforms, as in training and validation. ConfigError for a
    model that has no generator or writes something else than what was masked.
    """
    _check_restores(piece)
    assert microbatch.masked_slots is not None and microbatch.masked_valid is not None
    was_training = piece.training
    piece.eval()
    # The heads report their losses, which nobody asks for here.
    counts = count_tokens([microbatch])
    piece.losses = StepLosses(ObjectiveConfig(), counts, loss_scale=torch.ones_like(counts[0]))
    encoded = piece.encode(microbatch)
    assert encoded.sampled_ids is not None
    filled = fill_slots(microbatch.encoder_tokens, microbatch.masked_slots, encoded.sampled_ids)
    probs: list[tuple] = [()] * microbatch.shape.micro_batch_size
    is_real = mark_real_positions(microbatch)
    if piece.context.model.has_encoder_rtd_head:
        probs = _list_rows(piece.judge(encoded.hidden).t().sigmoid(), is_real)
    restored = decode_masked(piece, microbatch, encoded, filled)
    piece.train(was_training)
    columns = [
        _list_rows(microbatch.encoder_tokens, is_real),
        _list_rows(microbatch.masked_slots, microbatch.masked_valid),
        _list_rows(filled, is_real),
        probs,
        _list_rows(restored, microbatch.masked_valid),
    ]
    return [
        Restoration(original_ids=original, masked_slots=slots, filled_ids=fills, replaced_probs=prob, restored_ids=ids)
        for original, slots, fills, prob, ids in zip(*columns)
    ]


def _check_restores(piece: ChainPiece) -> None:
    model, kind = piece.context.model, piece.context.target_kind
    if not model.has_generator:
        raise ConfigError("--generator-num-layers 0 leaves nothing to restore; give a model with a generator")
    if not model.has_lm_head:
        raise ConfigError(
            "--decoder-num-layers 0 without --encoder-lm-head writes nothing that could restore; give a model trained "
            "with --encoder-lm-head or with a decoder"
        )
    if kind == "others":
        raise ConfigError("--objective spactor writes spans, not what its generator fills; give a model of metro's")


def decode_masked(piece: ChainPiece, microbatch: Microbatch, encoded: BoundaryPayload, filled_BS: Tensor) -> Tensor:
    """Greedy ids [b, g] at the masked slots, all at once by an encoder alone, else from left to right.

    The decoder learnt to write masked positions after a true prefix, so elsewhere the prefix takes the encoder's token,
    which nobody changed, and at a masked position what the decoder itself wrote there. Every slot costs a pass of the
    decoder over the blocks. A decoder of masked tokens alone reads nothing but what it wrote.
    """
    assert microbatch.masked_slots is not None and microbatch.masked_valid is not None
    if not piece.context.model.has_decoder:
        return piece.predict(encoded, replace(microbatch, target_slots=microbatch.masked_slots))
    places, is_real = microbatch.masked_slots, microbatch.masked_valid
    width = microbatch.decoder_tokens.shape[1]
    if piece.context.target_kind == "fills" and not torch.equal(microbatch.target_slots[is_real], places[is_real]):
        places = microbatch.target_slots
    tokens = torch.cat([microbatch.decoder_tokens[:, :1], filled_BS[:, : width - 1]], dim=1)
    microbatch = replace(microbatch, target_slots=places)
    restored = torch.zeros_like(places)
    for number in range(int(is_real.sum(1).max())):
        written = piece.predict(encoded, replace(microbatch, decoder_tokens=tokens))[:, number : number + 1]
        restored[:, number : number + 1] = written
        # What is written at a position is read at the next; the last one's reader is the dump column.
        next_slot = (places[:, number : number + 1] + 1).clamp(max=width)
        tokens = fill_slots(tokens, next_slot, written)
    return restored


def count_repaired(blocks: Sequence[Restoration]) -> tuple[int, int]:
    """(corrupted positions the decoder repaired, corrupted positions) of all blocks."""
    return sum(len(block.repaired_slots) for block in blocks), sum(len(block.replaced_slots) for block in blocks)


def _list_rows(values: Tensor, is_kept: Tensor) -> list[tuple]:
    """Each row of [b, n] values as a tuple of the kept ones."""
    return [tuple(row[kept].tolist()) for row, kept in zip(values.cpu(), is_kept.cpu())]

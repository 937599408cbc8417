"""METRO denoising: blocks of tokens to microbatches. Letters: b blocks, s positions, t decoder positions, g slots."""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.lengths import count_slots
from megatron_metro.data.blocks import Blocks, map_rows
from megatron_metro.data.masking import corrupt_tokens, list_slots, round_counts
from megatron_metro.data.randomness import Purpose, choose, draw_words, to_uniforms
from megatron_metro.tokenizer import Vocabulary

Array = TypeVar("Array", bound=NDArray[Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class MetroObjective:
    """METRO denoising: masked text for the generator, original text for the main model (reference 3.2 and 3.3).

    Without a generator nobody fills the masks: the encoder reads the masked text itself.
    """

    vocabulary: Vocabulary
    sequence_length: int
    mask_prob: float = 0.15
    mask_token_prob: float = 0.8
    mask_random_prob: float = 0.1
    mask_special_tokens: bool = True
    rounds_at_random: bool = True  # the number of masked tokens; down when False
    has_generator: bool = True
    is_padded: bool = False  # complete_doc: blocks may end early
    largest_mask_prob: float | None = None  # of a schedule, whose steps all have as many slots as this needs

    @property
    def raw_length(self) -> int:
        """Tokens of a block, <s> included."""
        return self.sequence_length

    @property
    def has_bos(self) -> bool:
        """METRO's blocks start with <s>."""
        return True

    def shape(self, micro_batch_size: int) -> MicrobatchShape:
        """Shape of every microbatch; generator, where there is one, and decoder share the slots."""
        num_slots = self._num_slots
        return MicrobatchShape(
            micro_batch_size=micro_batch_size,
            encoder_length=self.sequence_length,
            decoder_length=self.sequence_length,
            num_masked_slots=num_slots if self.has_generator else 0,
            num_target_slots=num_slots,
        )

    @property
    def _num_slots(self) -> int:
        return count_slots(self.sequence_length, self.largest_mask_prob or self.mask_prob)

    def make_batch(self, blocks: Blocks) -> Microbatch:
        """The microbatch of these blocks; row i depends on row i alone."""
        masked_text, decoder_tokens, slots, ids, valid, uniforms = map_rows(blocks, self._make_rows)
        padding = None
        if self.is_padded:
            padding = torch.from_numpy(np.arange(self.sequence_length) >= blocks.lengths[:, None])
        batch = Microbatch(
            encoder_tokens=torch.from_numpy(blocks.tokens) if self.has_generator else masked_text,
            decoder_tokens=decoder_tokens,
            target_slots=slots,
            target_ids=ids,
            target_valid=valid,
            encoder_padding=padding,
            decoder_padding=padding,
        )
        if not self.has_generator:
            return batch
        return replace(
            batch,
            generator_tokens=masked_text,
            masked_slots=slots,
            masked_ids=ids,
            masked_valid=valid,
            uniforms=uniforms,
        )

    def _make_rows(self, blocks: Blocks) -> tuple[NDArray, ...]:
        tokens, length = blocks.tokens, self.sequence_length
        words = draw_words(blocks.keys, Purpose.MASK, 3 * length + 1)
        chosen = self._choose_positions(blocks, words)
        slots, valid = list_slots(chosen, self._num_slots)
        ids = np.where(valid, _take(tokens, slots), self.vocabulary.pad_id)
        corrupted = corrupt_tokens(
            ids,
            words=(_take(words[:, length : 2 * length], slots), _take(words[:, 2 * length : 3 * length], slots)),
            probs=(self.mask_token_prob, self.mask_random_prob),
            mask_id=self.vocabulary.sentinel_ids[0],
            random_ids=range(self.vocabulary.mask_id, self.vocabulary.vocab_size),
        )
        masked_text = tokens.copy()
        masked_text[chosen] = corrupted[valid]
        # Keyed by position, so that the slot a position falls into is of no consequence.
        uniforms = np.where(valid, to_uniforms(_take(draw_words(blocks.keys, Purpose.SAMPLE, length), slots)), 0.0)
        return masked_text, self._shift_right(blocks), slots, ids, valid, uniforms

    def _choose_positions(self, blocks: Blocks, words: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """[b, s]: uniformly without replacement over the whole item; <s> and </s> are eligible as in the reference."""
        uniforms = to_uniforms(words[:, -1]) * self.rounds_at_random
        counts = round_counts(blocks.lengths, self.mask_prob, uniforms)
        candidates = None
        if self.is_padded:
            candidates = np.arange(self.sequence_length) < blocks.lengths[:, None]
        if not self.mask_special_tokens:
            ordinary = ~np.isin(blocks.tokens, (self.vocabulary.bos_id, self.vocabulary.eos_id))
            candidates = ordinary if candidates is None else candidates & ordinary
        if candidates is not None:
            counts = np.minimum(counts, candidates.sum(axis=1))
        return choose(words[:, : self.sequence_length], counts, candidates)

    def _shift_right(self, blocks: Blocks) -> NDArray[np.int64]:
        """[b, t]: the first sentinel, then the original text without its last token."""
        shifted = np.empty_like(blocks.tokens)
        shifted[:, 0] = self.vocabulary.sentinel_ids[0]
        shifted[:, 1:] = blocks.tokens[:, :-1]
        if self.is_padded:
            shifted[np.arange(self.sequence_length) >= blocks.lengths[:, None]] = self.vocabulary.pad_id
        return shifted


def _take(values: Array, slots: NDArray[np.int64]) -> Array:
    """[b, g] entries of [b, s] at slots; an unused slot reads the last column."""
    return np.take_along_axis(values, np.minimum(slots, values.shape[1] - 1), axis=1)  # type: ignore[return-value]

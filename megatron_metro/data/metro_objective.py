"""METRO denoising: blocks of tokens to microbatches. Letters: b blocks, s positions, t decoder positions, g slots."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_metro.batch import Microbatch, MicrobatchShape
from megatron_metro.config.lengths import Lengths, count_slots
from megatron_metro.config.objectives import has_decoder
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.blocks import Blocks, map_rows
from megatron_metro.data.masking import (
    Ids,
    Mask,
    choose_spans,
    corrupt_tokens,
    draw_uniforms,
    list_slots,
    round_counts,
    take_slots,
)
from megatron_metro.data.randomness import Purpose, choose, draw_words, to_uniforms
from megatron_metro.data.text_to_text import shift_right
from megatron_metro.tokenizer import Vocabulary


class _Targets(NamedTuple):
    """What the LM head is trained on."""

    slots: Tensor  # [b, m]
    ids: Tensor
    valid: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MetroObjective:
    """METRO denoising: masked text for the generator, original text for the main model (reference 3.2 and 3.3).

    Without a generator nobody fills the masks: the encoder reads the masked text itself. Without a decoder (ELECTRA,
    COCO-LM) target slots are encoder positions.
    """

    vocabulary: Vocabulary
    sequence_length: int
    mask_prob: float = 0.15
    mask_token_prob: float = 0.8
    mask_random_prob: float = 0.1
    mask_special_tokens: bool = True
    rounds_at_random: bool = True  # the number of masked tokens; down when False
    mask_spans: bool = False  # contiguous ones of mean length `mean_span`
    mean_span: float = 3.0
    lm_targets: Literal["masked", "all", "masked-only"] = "masked"
    has_generator: bool = True
    has_decoder: bool = True
    is_padded: bool = False  # complete_doc: blocks may end early
    num_slots: int | None = None  # static; those of `mask_prob` when not given, where a schedule may need more

    @property
    def raw_length(self) -> int:
        """Tokens of a block, <s> included."""
        return self.sequence_length

    @property
    def has_bos(self) -> bool:
        """METRO's blocks start with <s>, where the vocabulary has one."""
        return self.vocabulary.bos_id is not None

    def shape(self, micro_batch_size: int) -> MicrobatchShape:
        """Shape of every microbatch; generator, where there is one, and LM head share the slots unless all count."""
        num_slots = self._num_slots
        decoder_length = num_slots if self.lm_targets == "masked-only" else self.sequence_length
        return MicrobatchShape(
            micro_batch_size=micro_batch_size,
            encoder_length=self.sequence_length,
            decoder_length=decoder_length if self.has_decoder else 0,
            num_masked_slots=num_slots if self.has_generator else 0,
            num_target_slots=self.sequence_length if self.lm_targets == "all" else num_slots,
        )

    @property
    def _num_slots(self) -> int:
        return self.num_slots or count_slots(self.sequence_length, self.mask_prob)

    def make_batch(self, blocks: Blocks) -> Microbatch:
        """The microbatch of these blocks; row i depends on row i alone."""
        masked_text, decoder_tokens, slots, ids, valid, uniforms = map_rows(blocks, self._make_rows)
        padding = None
        if self.is_padded:
            padding = torch.from_numpy(np.arange(self.sequence_length) >= blocks.lengths[:, None])
        decoder_padding = (~valid if self.lm_targets == "masked-only" else padding) if self.has_decoder else None
        targets = self._list_targets(blocks, _Targets(slots, ids, valid))
        batch = Microbatch(
            encoder_tokens=torch.from_numpy(blocks.tokens) if self.has_generator else masked_text,
            decoder_tokens=decoder_tokens,
            target_slots=targets.slots,
            target_ids=targets.ids,
            target_valid=targets.valid,
            encoder_padding=padding,
            decoder_padding=decoder_padding,
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
        ids = np.where(valid, take_slots(tokens, slots), self.vocabulary.pad_id)
        corrupted = corrupt_tokens(
            ids,
            words=(
                take_slots(words[:, length : 2 * length], slots),
                take_slots(words[:, 2 * length : 3 * length], slots),
            ),
            probs=(self.mask_token_prob, self.mask_random_prob),
            mask_id=self.vocabulary.masked_id,
            random_ids=self.vocabulary.random_ids,
        )
        masked_text = tokens.copy()
        masked_text[chosen] = corrupted[valid]
        uniforms = draw_uniforms(blocks.keys, length, slots, valid)
        return masked_text, self._read_decoder(blocks, ids, valid), slots, ids, valid, uniforms

    def _choose_positions(self, blocks: Blocks, words: NDArray[np.uint64]) -> Mask:
        """[b, s]: uniformly without replacement over the whole item; <s> and </s> are eligible as in the reference.

        With `mask_spans` as many tokens, but in spans; a span passes over tokens that are not eligible.
        """
        length = self.sequence_length
        uniforms = to_uniforms(words[:, -1]) * self.rounds_at_random
        counts = round_counts(blocks.lengths, self.mask_prob, uniforms)
        candidates = self._find_candidates(blocks)
        if candidates is not None:
            counts = np.minimum(counts, candidates.sum(axis=1))
        if not self.mask_spans:
            return choose(words[:, :length], counts, candidates)
        words = draw_words(blocks.keys, Purpose.MASK_SPANS, 2 * length + 1)
        if candidates is None:
            return choose_spans(words, counts, blocks.lengths, self.mean_span)
        among_candidates = choose_spans(words, counts, candidates.sum(axis=1), self.mean_span)
        ranks = np.maximum(candidates.cumsum(axis=1) - 1, 0)
        return candidates & np.take_along_axis(among_candidates, ranks, axis=1)

    def _find_candidates(self, blocks: Blocks) -> Mask | None:
        """[b, s] tokens that may be masked; None for all."""
        candidates = None
        if self.is_padded:
            candidates = np.arange(self.sequence_length) < blocks.lengths[:, None]
        if not self.mask_special_tokens:
            ends = [i for i in (self.vocabulary.bos_id, self.vocabulary.eos_id) if i is not None]
            ordinary = ~np.isin(blocks.tokens, ends)
            candidates = ordinary if candidates is None else candidates & ordinary
        return candidates

    def _read_decoder(self, blocks: Blocks, ids: Ids, valid: Mask) -> Ids:
        """[b, t]: the start token, then what is written without its last token; empty without a decoder."""
        if not self.has_decoder:
            return np.empty((len(blocks), 0), dtype=np.int64)
        start = self.vocabulary.decoder_start_id
        if self.lm_targets == "masked-only":
            return np.where(valid, shift_right(ids, start), self.vocabulary.pad_id)
        shifted = shift_right(blocks.tokens, start)
        if self.is_padded:
            shifted[np.arange(self.sequence_length) >= blocks.lengths[:, None]] = self.vocabulary.pad_id
        return shifted

    def _list_targets(self, blocks: Blocks, masked: _Targets) -> _Targets:
        """Where the LM head writes what: masked slots, all positions, or the decoder's first ones."""
        if self.lm_targets == "masked":
            return masked
        if self.lm_targets == "masked-only":
            width = masked.slots.shape[1]
            return masked._replace(slots=torch.where(masked.valid, torch.arange(width), width))
        length = self.sequence_length
        valid = torch.from_numpy(np.arange(length) < blocks.lengths[:, None])
        return _Targets(torch.where(valid, torch.arange(length), length), torch.from_numpy(blocks.tokens), valid)


def build_metro(run: RunConfig, vocabulary: Vocabulary, lengths: Lengths) -> MetroObjective:
    """`metro` and `electra` as a run asks for them."""
    config = run.objective
    return MetroObjective(
        vocabulary=vocabulary,
        sequence_length=lengths.encoder,
        mask_prob=config.mask_prob,
        num_slots=int(lengths.masked or lengths.targets) if config.mask_prob_schedule else None,
        mask_token_prob=config.mask_token_prob,
        mask_random_prob=config.mask_random_prob,
        mask_special_tokens=config.mask_special_tokens,
        rounds_at_random=config.probabilistic_rounding,
        mask_spans=config.mask_spans,
        mean_span=config.mean_noise_span_length,
        lm_targets=config.lm_targets,
        has_generator=run.model.has_generator,
        has_decoder=has_decoder(run),
        is_padded=run.data.block_mode == "complete_doc",
    )

"""What one forward pass reads: the same tensors for every objective, built by `data`, read by `model`.

Shape letters: b sequences, s encoder positions, t decoder positions, g masked slots, m target slots.
A slot list has a static length; an unused slot points at the dump row (s or t, one past the end) and is not valid.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MicrobatchShape:
    """All numbers that fix the shapes of a microbatch, and so of every pipeline message."""

    micro_batch_size: int
    encoder_length: int
    decoder_length: int
    num_masked_slots: int
    num_target_slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One microbatch of one data-parallel rank. Ids and slots are int64, masks bool, uniforms float64."""

    encoder_tokens: Tensor  # [b, s] the encoder's input before the generator's fills (METRO: the original text)
    decoder_tokens: Tensor  # [b, t] the decoder's input, shifted right
    target_slots: Tensor  # [b, m] decoder positions whose output is projected to the vocabulary
    target_ids: Tensor  # [b, m] what must be written there
    target_valid: Tensor  # [b, m] False for unused slots
    generator_tokens: Tensor | None = None  # [b, s] masked text the generator reads
    masked_slots: Tensor | None = None  # [b, g] positions the generator fills; METRO: equal to target_slots
    masked_ids: Tensor | None = None  # [b, g] the original ids there
    masked_valid: Tensor | None = None  # [b, g]
    uniforms: Tensor | None = None  # [b, g] in [0, 1), one per sampled token
    encoder_padding: Tensor | None = None  # [b, s] True at pad; None where no block is padded
    decoder_padding: Tensor | None = None  # [b, t]
    # Of packed rows: which example a position belongs to, from 0 and never falling; None where a row is one text. Pad
    # is -1 for the encoder; in the decoder, where the causal order hides it, it goes on with the last example.
    encoder_segments: Tensor | None = None  # [b, s] int64
    decoder_segments: Tensor | None = None  # [b, t] int64

    @property
    def shape(self) -> MicrobatchShape:
        b, s = self.encoder_tokens.shape
        return MicrobatchShape(
            micro_batch_size=b,
            encoder_length=s,
            decoder_length=self.decoder_tokens.shape[1],
            num_masked_slots=0 if self.masked_slots is None else self.masked_slots.shape[1],
            num_target_slots=self.target_slots.shape[1],
        )

    def without_masks(self) -> "Microbatch":
        """The same microbatch, of the same shape, in which the generator has nothing to fill."""
        assert self.masked_slots is not None and self.masked_valid is not None
        unused = torch.full_like(self.masked_slots, self.encoder_tokens.shape[1])
        return replace(self, masked_slots=unused, masked_valid=torch.zeros_like(self.masked_valid))

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch on another device."""
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in present.items()})

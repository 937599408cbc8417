"""Reading a source once and writing after it, token by token: the main model's units outside of training.

No losses, no slots, no dropout, and nothing is sharded along the sequence. The generator takes no part.
Shape letters: b sources, s encoder positions, r rows being written (r / b of each source, side by side), t new
positions, h width, v the rank's columns of the vocabulary.
"""

from torch import Tensor

from megatron_metro.model.layer import AttentionInputs
from megatron_metro.model.packed_rows import ignored_keys
from megatron_metro.model.past import WritingState
from megatron_metro.model.piece_modules import PieceModules


class WritingPiece(PieceModules):
    """What a piece does of the encoder's and of the decoder's work."""

    def read_source(self, tokens_BS: Tensor, padding: Tensor | None, hidden_SBH: Tensor | None) -> Tensor:
        """The encoder's units of this piece: what the piece before it made, [s, b, h], to [s, b, h].

        `padding` is bool [b, s], True at pad. The first piece of the encoder takes no hidden states.
        """
        assert not self.config.sequence_parallel
        mask = ignored_keys(padding)
        length = tokens_BS.shape[1]
        bias = self.encoder.stack_bias(length) if any(unit.kind == "encoder_layer" for unit in self.units) else None
        for unit in self.units:
            if unit.kind in ("mlm_head", "encoder_embedding"):
                hidden_SBH = self._embed(self.encoder, tokens_BS, padding, 0.0)
            elif unit.kind == "encoder_layer":
                assert unit.index is not None and hidden_SBH is not None
                inputs = AttentionInputs(bias=bias, mask=mask)
                hidden_SBH = self.encoder.run_layer(unit.index, hidden_SBH, length, inputs)
            elif unit.kind == "encoder_head":
                hidden_SBH = self.encoder.finish(hidden_SBH)
        assert hidden_SBH is not None
        return hidden_SBH

    def start_writing(self, context_SBH: Tensor, padding: Tensor | None) -> WritingState:
        """The state before the first token, from the encoder's output [s, b, h]."""
        mask = ignored_keys(padding)
        has_layers = any(unit.kind == "decoder_layer" for unit in self.units)
        return WritingState(source_mask=mask, layers=self.decoder.remember(context_SBH) if has_layers else {})

    def write(self, tokens_RT: Tensor, hidden_TRH: Tensor | None, state: WritingState) -> Tensor:
        """The decoder's units of this piece, up to what the LM head projects; the state moves on by t positions.

        [t, r, h] of the piece before it to [t, r, h]; the first piece of the decoder takes no hidden states.
        """
        for unit in self.units:
            if unit.kind == "decoder_embedding":
                hidden_TRH = self._embed(self.decoder, tokens_RT, None, 0.0, start=state.length)
        assert hidden_TRH is not None
        if state.layers:
            hidden_TRH = self.decoder.write_layers(hidden_TRH, state)
        state.length += tokens_RT.shape[1]
        return self.decoder.finish(hidden_TRH)

    def project(self, rows_NH: Tensor) -> Tensor:
        """The LM head's logits [n, v] of this rank's columns, for hidden states [n, h] that `write` gave."""
        return self._project(rows_NH)

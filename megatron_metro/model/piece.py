"""A contiguous piece of the chain on one rank: runs its units in order, from one boundary payload to the next.

Shape letters: s encoder positions, t decoder positions (shards under sequence parallelism), b sequences, h width,
g masked slots, m target slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_metro.batch import Microbatch
from megatron_metro.config.chain import Network, Unit, UnitKind, build_chain
from megatron_metro.config.payload import PayloadRows, payload_rows
from megatron_metro.losses.copying import mix_losses
from megatron_metro.losses.step import StepLosses
from megatron_metro.model.layer import AttentionInputs
from megatron_metro.model.network import NetworkShare
from megatron_metro.model.packed_rows import ignored_keys
from megatron_metro.model.piece_modules import PieceContext
from megatron_metro.model.slots import fill_slots, mark_real_positions
from megatron_metro.model.writing import WritingPiece
from megatron_metro.parallel import vocab_ops
from megatron_metro.parallel.boundary import BoundaryPayload, pack, unpack


@dataclass(frozen=True, slots=True)
class _Running:
    """What flows from unit to unit within a piece."""

    payload: BoundaryPayload
    network: Network
    bias: Tensor | None  # the running network's shared relative bias, if it has one
    is_short: bool = False  # hidden states stand at the slots of the head that follows, not at all positions


class ChainPiece(WritingPiece):
    """Generator, encoder and decoder as far as this piece holds them, with the heads in between."""

    def __init__(
        self,
        context: PieceContext,
        units: tuple[Unit, ...],
        previous: Unit | None,
        vp_stage: int | None,
    ) -> None:
        super().__init__(context, units)
        self.previous, self.vp_stage = previous, vp_stage
        self.model_type = ModelType.encoder_or_decoder  # asked for by megatron-core's schedules
        self.losses: StepLosses | None = None
        self._message: Tensor | None = None
        self._following = dict(pairwise(units))
        self._ends_chain = units[-1] == build_chain(context.model)[-1]
        self._run: dict[UnitKind, Callable[[Unit, _Running, Microbatch], _Running]] = {
            "generator_embedding": self._embed_generator,
            "generator_layer": self._run_layer,
            "mlm_head": self._fill_and_embed,
            "encoder_embedding": self._embed_encoder,
            "encoder_layer": self._run_layer,
            "encoder_head": self._end_encoder,
            "decoder_embedding": self._embed_decoder,
            "decoder_layer": self._run_layer,
        }

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the previous piece's message; called by megatron-core's schedules before each forward."""
        (self._message,) = input_tensor

    def forward(self, microbatch: Microbatch) -> Tensor:
        """The message [rows, b, h] for the next piece or, at the end of the chain, the last head's summed loss."""
        assert self.losses is not None, "begin_step comes before the first forward pass"
        units = self.units[:-1] if self._ends_chain else self.units
        running = self._pass(units, self._receive(microbatch), microbatch)
        if self._ends_chain:
            end = self._write if self.units[-1].kind == "lm_head" else self._judge_encoder
            return end(running, microbatch, self.losses)
        return pack(running.payload, self._rows_after(self.units[-1], microbatch))

    def encode(self, microbatch: Microbatch) -> BoundaryPayload:
        """What enters the decoder of a model in one piece: the encoder's output and the generator's fills."""
        units = [unit for unit in self.units if unit.network != "decoder"]
        return self._pass(units, self._receive(microbatch), microbatch).payload

    def predict(self, encoded: BoundaryPayload, microbatch: Microbatch) -> Tensor:
        """The decoder's greedy ids [b, m] at the target slots, from what `encode` gave and the decoder tokens."""
        units = [unit for unit in self.units if unit.network == "decoder" and unit.kind != "lm_head"]
        running = self._pass(units, _Running(encoded, "encoder", None), microbatch)
        rows = self._rows_at(self._finish_writing(running), microbatch.target_slots, running.is_short)
        verdicts = None if encoded.replaced_prob is None else encoded.replaced_prob.flatten()
        predicted = self._predict(rows, self._find_inputs(encoded, microbatch), verdicts)
        return predicted.view_as(microbatch.target_slots)

    def _pass(self, units: Sequence[Unit], running: _Running, microbatch: Microbatch) -> _Running:
        for unit in units:
            running = self._run[unit.kind](unit, running, microbatch)
        return running

    def _receive(self, microbatch: Microbatch) -> _Running:
        first = self.units[0]
        if self.previous is None:
            nothing = torch.empty(0, device=microbatch.encoder_tokens.device)
            return _Running(BoundaryPayload(hidden=nothing), first.network, None)
        assert self._message is not None
        rows = self._rows_after(self.previous, microbatch)
        payload = unpack(self._message, rows, microbatch.shape.num_masked_slots)
        self._message = None  # held no longer than it is needed
        network = self.previous.network
        return _Running(payload, network, self._stack_bias(network, microbatch))

    def _rows_after(self, unit: Unit, microbatch: Microbatch) -> PayloadRows:
        shape = microbatch.shape
        return payload_rows(
            unit,
            self.context.model,
            encoder_length=shape.encoder_length,
            decoder_length=shape.decoder_length,
            num_masked_slots=shape.num_masked_slots,
            sequence_shards=self.tp_group.size() if self.config.sequence_parallel else 1,
        )

    # Units, in the order of the chain.

    def _embed_generator(self, unit: Unit, running: _Running, microbatch: Microbatch) -> _Running:
        assert microbatch.generator_tokens is not None
        own = self.context.model.generator_embedding_sharing == "token"
        hidden = self._embed(
            self.generator if own else self.encoder,
            microbatch.generator_tokens,
            microbatch.encoder_padding,
            self.context.configs["generator"].hidden_dropout,
        )
        payload = replace(running.payload, hidden=self.generator.project(hidden))
        return self._start("generator", payload, microbatch)

    def _run_layer(self, unit: Unit, running: _Running, microbatch: Microbatch) -> _Running:
        assert unit.index is not None
        padding, slots = microbatch.encoder_padding, self._slots_after(unit, microbatch)
        sources, targets = microbatch.encoder_segments, microbatch.decoder_segments
        if unit.kind == "decoder_layer":
            length = microbatch.shape.decoder_length
            inputs = AttentionInputs(
                bias=running.bias,
                # Padding stands at the end, where the causal order already hides it from every real position.
                mask=ignored_keys(None, targets, targets),
                context=running.payload.encoder_output,
                context_mask=ignored_keys(padding, targets, sources),
                slots=slots,
            )
        else:
            length = microbatch.shape.encoder_length
            inputs = AttentionInputs(bias=running.bias, mask=ignored_keys(padding, sources, sources), slots=slots)
        share: NetworkShare = getattr(self, unit.network)
        hidden = share.run_layer(unit.index, running.payload.hidden, length, inputs)
        return replace(running, payload=replace(running.payload, hidden=hidden), is_short=slots is not None)

    def _fill_and_embed(self, unit: Unit, running: _Running, microbatch: Microbatch) -> _Running:
        """MLM loss, the generator's fills, and the encoder's embedding of the corrupted input."""
        assert self.losses is not None and microbatch.masked_slots is not None
        assert microbatch.masked_ids is not None and microbatch.masked_valid is not None
        assert microbatch.uniforms is not None
        shard = self.context.shard
        hidden = self.generator.finish(running.payload.hidden)
        logits = self.mlm_head(self._rows_at(hidden, microbatch.masked_slots, running.is_short), self.word_embeddings)
        targets, excluded = microbatch.masked_ids.flatten(), (self.context.pad_id,)
        statistics = vocab_ops.measure(logits, shard, targets_N=targets, excluded_ids=excluded)
        nll = vocab_ops.cross_entropy(logits, targets, shard, statistics).view_as(microbatch.masked_ids)
        fills = vocab_ops.sample(logits, microbatch.uniforms.flatten(), shard, excluded, statistics)
        sampled_ids = torch.where(microbatch.masked_valid, fills.view_as(microbatch.masked_ids), 0)
        is_right = statistics.argmax_N.view_as(microbatch.masked_ids) == microbatch.masked_ids
        is_replaced = sampled_ids != microbatch.masked_ids
        loss = self.losses.add_mlm(nll, is_right, is_replaced, microbatch.masked_valid)
        corrupted = fill_slots(microbatch.encoder_tokens, microbatch.masked_slots, sampled_ids)
        hidden = self._embed(
            self.encoder, corrupted, microbatch.encoder_padding, self.context.configs["encoder"].hidden_dropout
        )
        payload = replace(running.payload, hidden=self.losses.inject(hidden, loss), sampled_ids=sampled_ids)
        return self._start("encoder", payload, microbatch)

    def _embed_encoder(self, unit: Unit, running: _Running, microbatch: Microbatch) -> _Running:
        hidden = self._embed(
            self.encoder,
            microbatch.encoder_tokens,
            microbatch.encoder_padding,
            self.context.configs["encoder"].hidden_dropout,
            segments=microbatch.encoder_segments,
        )
        return self._start("encoder", replace(running.payload, hidden=hidden), microbatch)

    def _end_encoder(self, unit: Unit, running: _Running, microbatch: Microbatch) -> _Running:
        """Final norm of a Pre-LN encoder, and the RTD loss where it is the encoder's."""
        assert self.losses is not None
        hidden, payload = self.encoder.finish(running.payload.hidden), running.payload
        if self.context.model.has_encoder_rtd_head:
            loss, replaced_prob = self._detect_replaced(hidden, payload, microbatch, self.losses)
            hidden, payload = self.losses.inject(hidden, loss), replace(payload, replaced_prob=replaced_prob)
        return replace(running, payload=replace(payload, hidden=hidden))

    def _judge_encoder(self, running: _Running, microbatch: Microbatch, losses: StepLosses) -> Tensor:
        """The RTD loss that ends the chain of an encoder alone (ELECTRA)."""
        loss, _ = self._detect_replaced(
            self.encoder.finish(running.payload.hidden), running.payload, microbatch, losses
        )
        return loss

    def _embed_decoder(self, unit: Unit, running: _Running, microbatch: Microbatch) -> _Running:
        hidden = self._embed(
            self.decoder,
            microbatch.decoder_tokens,
            None,
            self.context.configs["decoder"].hidden_dropout,
            segments=microbatch.decoder_segments,
        )
        payload = replace(running.payload, hidden=hidden, encoder_output=running.payload.hidden)
        return self._start("decoder", payload, microbatch)

    def _write(self, running: _Running, microbatch: Microbatch, losses: StepLosses) -> Tensor:
        """The corrective LM loss at the target slots, summed over the microbatch; with RTD's where it reads these."""
        shard, payload = self.context.shard, running.payload
        hidden = self._finish_writing(running)
        verdict_loss: Tensor | float = 0.0
        if self.context.model.has_decoder_rtd_head:
            slots = microbatch.target_slots
            verdict_loss, replaced_prob = self._detect_replaced(hidden, payload, microbatch, losses, slots)
            payload = replace(payload, replaced_prob=replaced_prob)
        rows = self._rows_at(hidden, microbatch.target_slots, running.is_short)
        logits, targets = self._project(rows), microbatch.target_ids.flatten()
        statistics = vocab_ops.measure(logits, shard, targets_N=targets)
        nll, picked = vocab_ops.cross_entropy(logits, targets, shard, statistics), statistics.argmax_N
        inputs = self._find_inputs(payload, microbatch)
        if inputs is not None and self.context.model.copy_mechanism:
            assert payload.replaced_prob is not None, "--copy-mechanism needs an RTD head"
            verdicts = payload.replaced_prob.flatten()
            nll = mix_losses(nll, verdicts, inputs == targets)
            picked = self._pick(logits, statistics, inputs, verdicts)
        if inputs is not None and self.context.eval_all_positions and not self.training:
            self._score_all_positions(hidden, payload, microbatch, losses)
        elif inputs is not None:
            shape = microbatch.target_valid.shape
            is_right, is_replaced = (picked == targets).view(shape), (inputs != targets).view(shape)
            losses.record_lm(is_right, is_replaced, microbatch.target_valid)
        nll = nll.view_as(microbatch.target_ids)
        return losses.add_lm(nll, microbatch.target_valid, payload.replaced_prob) + verdict_loss

    # Parts of units.

    def _detect_replaced(
        self,
        hidden: Tensor,
        payload: BoundaryPayload,
        microbatch: Microbatch,
        losses: StepLosses,
        slots_BM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """RTD's loss over every real position, and the FP32 probability of "replaced" [b, m] at slots.

        Those are the masked ones [b, g] where no others are given.
        """
        assert payload.sampled_ids is not None and microbatch.masked_slots is not None
        logits = self.judge(hidden)
        if self.config.sequence_parallel:  # every rank computes the whole loss; backward keeps its own positions
            logits = gather_from_sequence_parallel_region(
                logits, tensor_parallel_output_grad=False, group=self.tp_group
            )
        corrupted = fill_slots(microbatch.encoder_tokens, microbatch.masked_slots, payload.sampled_ids)
        labels = (corrupted != microbatch.encoder_tokens).t()
        loss = losses.add_rtd(logits, labels, mark_real_positions(microbatch).t())
        slots = (microbatch.masked_slots if slots_BM is None else slots_BM).clamp(max=logits.shape[0] - 1)
        # Widened first: a probability rounded to BF16 would weigh losses in steps of 1/256.
        wide = torch.promote_types(logits.dtype, torch.float32)
        return loss, logits.detach().t().gather(1, slots).to(wide).sigmoid().float()

    def _finish_writing(self, running: _Running) -> Tensor:
        """Hidden states that the LM head reads: the decoder's, or those of an encoder alone, which are finished."""
        hidden = running.payload.hidden
        return self.decoder.finish(hidden) if self.context.model.has_decoder else hidden

    def _find_inputs(self, payload: BoundaryPayload, microbatch: Microbatch) -> Tensor | None:
        """The encoder's corrupted tokens [b x m] at the places of the targets; None where targets have none."""
        if payload.sampled_ids is None or self.context.target_kind == "others":
            return None
        if self.context.target_kind == "fills":
            return payload.sampled_ids.flatten()
        assert microbatch.masked_slots is not None
        corrupted = fill_slots(microbatch.encoder_tokens, microbatch.masked_slots, payload.sampled_ids)
        return corrupted.gather(1, microbatch.target_slots.clamp(max=corrupted.shape[1] - 1)).flatten()

    def _slots_after(self, unit: Unit, microbatch: Microbatch) -> Tensor | None:
        """The only positions at which a layer's output is read: where a head follows it in this very piece.

        None where they are not worth it or cannot be sharded; the mathematics is the same either way.
        """
        heads = {"generator_layer": "mlm_head", "decoder_layer": "lm_head"}
        following = self._following.get(unit)
        if following is None or following.kind != heads.get(unit.kind):
            return None
        if following.kind == "lm_head" and self._reads_all_positions():
            return None
        slots = microbatch.masked_slots if following.kind == "mlm_head" else microbatch.target_slots
        length = microbatch.shape.encoder_length if following.kind == "mlm_head" else microbatch.shape.decoder_length
        assert slots is not None
        shards = self.tp_group.size() if self.config.sequence_parallel else 1
        return slots if slots.shape[1] < length and slots.shape[1] % shards == 0 else None

    def _reads_all_positions(self) -> bool:
        """Whether more than the LM loss at its slots is read from the decoder's output."""
        is_scored = self.context.eval_all_positions and not self.training
        return is_scored or self.context.model.has_decoder_rtd_head

    def _score_all_positions(
        self, hidden: Tensor, payload: BoundaryPayload, microbatch: Microbatch, losses: StepLosses
    ) -> None:
        """The decoder's hits at every real position (reference section 4), as many at a time as the loss has slots.

        Validation then holds no more logits at once than training does. METRO's decoder writes the original text, token
        i at position i.
        """
        assert payload.sampled_ids is not None and microbatch.masked_slots is not None
        originals, shape = microbatch.encoder_tokens, microbatch.shape
        corrupted = fill_slots(originals, microbatch.masked_slots, payload.sampled_ids)
        every = torch.arange(shape.decoder_length, device=originals.device).expand_as(originals)
        chunks = every.split(shape.num_target_slots, dim=1)
        picked = [
            self._predict(self._rows_at(hidden, slots, is_short=False), corrupted.gather(1, slots).flatten(), None)
            for slots in chunks
        ]
        predicted = torch.cat([ids.view_as(slots) for ids, slots in zip(picked, chunks)], dim=1)
        losses.record_lm(predicted == originals, corrupted != originals, mark_real_positions(microbatch))

    def _start(self, network: Network, payload: BoundaryPayload, microbatch: Microbatch) -> _Running:
        return _Running(payload, network, self._stack_bias(network, microbatch))

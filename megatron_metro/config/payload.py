"""What crosses a boundary between two pieces of the chain: named parts and their rows. A pure function of numbers.

A message is one tensor [rows, b, width] (design: one chain, one payload, three losses), as wide as the network it
leaves: within a generator of its own width only that network's hidden states cross, and shapes are known to both sides,
so nothing is padded or projected for the journey. `parallel.boundary` packs it and the cost model counts its bytes,
both from the numbers given here.
"""

from dataclasses import dataclass

from megatron_metro.config.chain import Unit
from megatron_metro.config.network_sizes import network_sizes
from megatron_metro.config.schema import ModelConfig

NUM_WEIGHT_DIGITS = 4  # the four bytes of one FP32 number


@dataclass(frozen=True, kw_only=True, slots=True)
class PayloadRows:
    """Rows of each part of a message, in the order in which they are concatenated.

    The hidden states and the encoder output are shards of the sequence under sequence parallelism; the aux rows are
    whole on every tensor-parallel rank. Each number of an aux row is a base-256 digit, exact in BF16 and FP16:
    `num_id_digits` of the sampled id and `num_weight_digits` of the FP32 weight sigmoid(z) per masked slot.
    """

    hidden: int
    encoder_output: int
    aux: int
    num_id_digits: int
    num_weight_digits: int
    width: int  # numbers in a row

    @property
    def total(self) -> int:
        return self.hidden + self.encoder_output + self.aux

    @property
    def parts(self) -> dict[str, int]:
        """The parts that are present and their rows, in order."""
        rows = {"hidden": self.hidden, "encoder_output": self.encoder_output, "aux": self.aux}
        return {name: count for name, count in rows.items() if count > 0}


def payload_rows(
    unit: Unit,
    model: ModelConfig,
    *,
    encoder_length: int,
    decoder_length: int,
    num_masked_slots: int,
    sequence_shards: int = 1,
) -> PayloadRows:
    """Rows of the message that leaves a piece ending with `unit`.

    `sequence_shards` is the tensor-parallel size under sequence parallelism and 1 otherwise; both lengths are multiples
    of it. `model.vocab_size` must be resolved when the model has a generator.
    """
    assert unit.kind != "lm_head", "nothing follows the LM head"
    assert encoder_length % sequence_shards == 0 and decoder_length % sequence_shards == 0
    in_decoder = unit.network == "decoder"
    encoder_rows, decoder_rows = encoder_length // sequence_shards, decoder_length // sequence_shards
    num_id_digits = _count_id_digits(model) if model.has_generator and unit.network != "generator" else 0
    follows_verdicts = model.has_encoder_rtd_head and (in_decoder or unit.kind == "encoder_head")
    num_weight_digits = NUM_WEIGHT_DIGITS if follows_verdicts else 0
    num_digits = num_masked_slots * (num_id_digits + num_weight_digits)
    width = network_sizes(model, unit.network).hidden_size
    return PayloadRows(
        hidden=decoder_rows if in_decoder else encoder_rows,
        encoder_output=encoder_rows if in_decoder else 0,
        aux=-(-num_digits // width),
        num_id_digits=num_id_digits,
        num_weight_digits=num_weight_digits,
        width=width,
    )


def _count_id_digits(model: ModelConfig) -> int:
    """Base-256 digits of a token id."""
    assert model.vocab_size is not None, "the vocabulary size is resolved before the model is laid out"
    assert model.vocab_size <= 256**3, "three digits address 16,777,216 tokens"
    return 2 if model.vocab_size <= 256**2 else 3

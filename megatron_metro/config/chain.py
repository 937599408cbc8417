"""The model as one chain of units: what a pipeline may be cut between. A pure function of the model's configuration."""

from dataclasses import dataclass
from typing import Literal

from megatron_metro.config.schema import ModelConfig

Network = Literal["generator", "encoder", "decoder"]
UnitKind = Literal[
    "generator_embedding",
    "generator_layer",
    "mlm_head",  # MLM loss, sampling and the encoder's embedding of what was sampled
    "encoder_embedding",  # only without a generator
    "encoder_layer",
    "encoder_head",  # final norm (T5) and replaced-token detection (METRO); ends ELECTRA
    "decoder_embedding",
    "decoder_layer",
    "lm_head",  # final norm (T5) and the LM loss; replaced-token detection where it reads the decoder
]


@dataclass(frozen=True, slots=True)
class Unit:
    """One link of the chain; `index` numbers the layers of a network from 0 and is None elsewhere."""

    kind: UnitKind
    index: int | None = None

    @property
    def network(self) -> Network:
        """The network whose hidden states leave this unit ("mlm_head" hands over to the encoder)."""
        if self.kind in ("generator_embedding", "generator_layer"):
            return "generator"
        if self.kind in ("mlm_head", "encoder_embedding", "encoder_layer", "encoder_head"):
            return "encoder"
        return "decoder"

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind} {self.index}"


def build_chain(model: ModelConfig) -> tuple[Unit, ...]:
    """All units of the model in the order a microbatch passes them (design: one chain, one payload, three losses).

    The last one is a head, whose loss ends the chain: the LM head or, in an encoder alone, the RTD head.
    """
    units: list[Unit] = []
    if model.has_generator:
        units.append(Unit("generator_embedding"))
        units += [Unit("generator_layer", i) for i in range(model.generator_num_layers)]
        units.append(Unit("mlm_head"))
    else:
        units.append(Unit("encoder_embedding"))
    units += [Unit("encoder_layer", i) for i in range(model.encoder_num_layers)]
    if model.has_encoder_rtd_head or model.norm_placement == "pre":
        units.append(Unit("encoder_head"))
    if model.has_decoder:
        units.append(Unit("decoder_embedding"))
        units += [Unit("decoder_layer", i) for i in range(model.decoder_num_layers)]
    if model.has_lm_head:
        units.append(Unit("lm_head"))
    return tuple(units)

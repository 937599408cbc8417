"""What the loss of an objective is made of, beside its flags: what targets stand for, divisors, weights by default."""

from collections.abc import Collection
from typing import Literal

from megatron_metro.config.fields import Value, change_values
from megatron_metro.config.objectives import OBJECTIVES, has_decoder
from megatron_metro.config.schema import ObjectiveConfig, RunConfig

# fills: target i is the original of what the generator filled into slot i; tokens: target slots are positions of the
# text, masked or not; others: what is written stands at no position of the encoder's input.
TargetKind = Literal["fills", "tokens", "others"]

# Of objectives whose terms are not weighed as METRO's.
LOSS_WEIGHTS: dict[str, dict[str, float]] = {"spactor": {"rtd_loss_weight": 10.0, "lm_loss_weight": 10.0}}


def target_kind(objective: ObjectiveConfig) -> TargetKind:
    """What the LM head's targets stand for: only where they are tokens of the text can one have been replaced."""
    if not OBJECTIVES[objective.objective].masks_tokens:
        return "others"
    return "tokens" if objective.lm_targets == "all" else "fills"


def is_divided_by_sequences(objective: ObjectiveConfig) -> bool:
    """Whether terms are sums over tokens per sequence (SPACTOR, equations 4, 6 and 8) rather than means per token."""
    return objective.objective == "spactor" and objective.spactor_normalisation == "sum"


def logit_means_original(objective: ObjectiveConfig) -> bool:
    """Whether the RTD head's output is the logit of "original" (SPACTOR, equation 5) rather than of "replaced"."""
    return objective.objective == "spactor"


def follow_objective(config: RunConfig, preset: RunConfig, chosen: Collection[str]) -> RunConfig:
    """What belongs to a preset's objective as the run's own objective needs it; what is `chosen` stays, legal or not.

    Networks without a use are left out, with what only works beside them, and another objective brings its own loss
    weights.
    """
    values: dict[str, Value] = {}
    if OBJECTIVES[config.objective.objective].generator == "none":
        values |= {"generator_num_layers": 0, "copy_mechanism": False, "rtd_position": "encoder"}
    if not has_decoder(config):
        values["decoder_num_layers"] = 0
    if config.objective.objective != preset.objective.objective:
        defaults = ObjectiveConfig()
        values |= {name: getattr(defaults, name) for name in ("mlm_loss_weight", "rtd_loss_weight", "lm_loss_weight")}
        values |= LOSS_WEIGHTS.get(config.objective.objective, {})
    return change_values(config, {name: value for name, value in values.items() if name not in chosen})

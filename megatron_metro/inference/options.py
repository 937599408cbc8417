"""How a text is written after a source, and which tokens begin and end it."""

from dataclasses import dataclass
from typing import Literal

from megatron_metro.config.errors import ConfigError
from megatron_metro.tokenizer import Vocabulary

START_TOKENS = ("eos", "pad", "sentinel")


@dataclass(frozen=True, kw_only=True, slots=True)
class WritingIds:
    """What the decoder reads first, what ends a text, and what follows its end."""

    start: int
    end: int
    pad: int

    @staticmethod
    def of(vocabulary: Vocabulary, start: str | None = None) -> "WritingIds":
        """T5's decoder starts with pad, METRO's with </s>; METRO's pretraining alone uses the first sentinel."""
        starts = {"eos": vocabulary.eos_id, "pad": vocabulary.pad_id, "sentinel": vocabulary.sentinel_ids[0]}
        first = vocabulary.writing_start_id if start is None else starts[start]
        return WritingIds(start=first, end=vocabulary.eos_id, pad=vocabulary.pad_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class WritingOptions:
    """How tokens are chosen. Raises ConfigError for numbers that leave no choice or have no use."""

    decoding: Literal["greedy", "sample", "beam"] = "greedy"
    max_new_tokens: int = 128  # the end token included
    temperature: float = 1.0  # sampling: logits are divided by it
    top_k: int = 0  # sampling: only the most likely tokens, 0 for all
    top_p: float = 1.0  # sampling: only the fewest tokens that have this probability together
    seed: int = 1234  # sampling
    num_beams: int = 4  # beam search, as T5 (section 3.7)
    length_penalty: float = 0.6  # beam search: the exponent alpha
    length_penalty_form: Literal["hf", "gnmt"] = "gnmt"

    def __post_init__(self) -> None:
        for name, use in (
            *((name, "sample") for name in ("temperature", "top_k", "top_p", "seed")),
            *((name, "beam") for name in ("num_beams", "length_penalty", "length_penalty_form")),
        ):
            is_default = getattr(self, name) == WritingOptions.__dataclass_fields__[name].default
            if use != self.decoding and not is_default:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} has no use in --decoding {self.decoding}; drop it or give --decoding {use}")
        for name, is_right, rule in (
            ("max_new_tokens", self.max_new_tokens > 0, "1 or more"),
            ("temperature", self.temperature > 0, "above 0; for the most likely tokens use --decoding greedy"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("num_beams", self.num_beams > 0, "1 or more"),
        ):
            if not is_right:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {getattr(self, name)} leaves nothing to choose; give a number {rule}")

"""What a run is: text, tokenizer, batches, schedule, objective, model. A run that goes on as another says so.

A step holds the resolved configuration of the run that saved it and, from `describe_identity`, checksums of tokenizer
and text. What does not change the numbers may differ freely when it is loaded: layout, logging, folders, paths of the
same files, length of the run. Anything else is refused by name, unless the flag that lets it pass is given.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_metro.checkpoint.start import Start, list_saved_settings
from megatron_metro.config.batches import count_completed_steps
from megatron_metro.config.errors import CheckpointError
from megatron_metro.config.fields import Value, list_settings, read_value, shorten
from megatron_metro.config.schema import RunConfig
from megatron_metro.data.loader import StepLoader
from megatron_metro.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)

# The field that lets a difference pass: of whole sections, so that a new setting is compared unless it is named below.
# An objective brings a model of its own, so it is named first.
_SECTIONS = {
    "objective": "override_objective",
    "data": "override_data",
    "tokenizer": "override_tokenizer",
    "optimizer": "override_opt_param_scheduler",
    "model": "override_model",
}
_PRECISION = ("bf16", "fp16", "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window")
_SETTINGS = {
    **dict.fromkeys((*_PRECISION, "cpu_matmul_precision"), "override_model"),
    **dict.fromkeys(("global_batch_size", "rampup_batch_size"), "override_batch_size"),
    "seed": "override_data",
    "decoder_seq_length": "override_objective",
}
# Of those sections: checksums stand for paths, the rest is of the start, of validation or of the machine.
_FREE = {
    *("data_path", "train_data_path", "valid_data_path", "split", "data_cache_path", "num_workers"),
    *("tokenizer_model", "tokenizer_type", "pre_tokenizer"),
    *("init_method", "init_method_std", "make_vocab_size_divisible_by"),
    "eval_all_positions",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Something that is not as it was when the step was saved."""

    flag: str
    old: str
    new: str
    override: str  # the field of CheckpointConfig that lets it pass

    @property
    def override_flag(self) -> str:
        return "--" + self.override.replace("_", "-")


def describe_identity(tokenizer: Tokenizer, loader: StepLoader) -> dict[str, Any]:
    """Checksums of a run's tokenizer and training text, for a step's document; plain JSON."""
    mixture = loader.mixture
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "normalizer": tokenizer.normalizer,
        "pre_tokenizer": tokenizer.pre_tokenizer,
        "text": [
            {
                "prefix": source.origin.path,
                "sha256": source.origin.sha256,
                "documents": list(source.origin.documents),
                "share": weight,
            }
            for source, weight in zip(mixture.sources, mixture.weights, strict=True)
        ],
    }


def check_identity(run: RunConfig, identity: Mapping[str, Any], start: Start) -> None:
    """Refuse to go on as another run than the one that was saved; a new run need only have its tokenizer.

    Raises CheckpointError that names flag, old and new value. Differences that flags allow are logged.
    """
    if start.step is None:
        return
    saved = start.document.get("identity") or {}
    if not saved and not start.is_new_run:
        raise CheckpointError(f"{start.step}: does not say which text it has seen; start a new run with --finetune")
    differences = list(_compare_tokenizers(saved, identity)) if saved else []
    if not start.is_new_run:
        differences += _compare_settings(run, start)
        differences += _compare_text(saved, identity)
    refused = [found for found in differences if not getattr(run.checkpoint, found.override)]
    if refused:
        first, others = refused[0], f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise CheckpointError(
            f"{start.step}: was saved with {first.flag} {first.old}, this run has {first.new}{others}; keep it, "
            f"give {first.override_flag} to change it" + ("" if start.is_new_run else ", or --finetune for a new run")
        )
    for found in differences:
        LOGGER.warning("%s: %s was %s, is now %s", found.override_flag, found.flag, found.old, found.new)
    if not start.is_new_run:
        _check_step_count(run, start)


def find_override(name: str) -> str | None:
    """The field that lets another value of a setting pass; None for a setting that may change freely."""
    if name in _SETTINGS:
        return _SETTINGS[name]
    return None if name in _FREE else _SECTIONS.get(list_settings()[name].section)


def _compare_settings(run: RunConfig, start: Start) -> Iterator[Difference]:
    old = list_saved_settings(start.document)
    new = {name: read_value(run, setting) for name, setting in list_settings().items()}
    unread = {name for values in (old, new) for name in _list_unread(values)}
    if run.objective.objective == "spactor" and start.iteration == run.objective.spactor_tau:
        # The step that SPACTOR's first stage ends with is where the second one drops the generator.
        unread.add("generator_num_layers")
    for name in sorted(old.keys() - unread, key=_rank):
        setting, override = list_settings()[name], find_override(name)
        if override is not None and old[name] != new[name]:
            yield Difference(flag=setting.flag, old=_show(old[name]), new=_show(new[name]), override=override)


def _rank(name: str) -> tuple[int, int]:
    """The order in which settings are named."""
    section = list_settings()[name].section
    return [*_SECTIONS, section].index(section), list(list_settings()).index(name)


def _list_unread(values: Mapping[str, Value]) -> Iterator[str]:
    """Settings without effect, of which one, the end of a decay that there is not, follows the length of the run."""
    if values["lr_decay_style"] == "constant":
        yield from ("lr_decay_iters", "min_lr")
    if values["lr_warmup_iters"] == 0:
        yield "lr_warmup_style"


def _show(value: Value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else shorten(value)


def _compare_tokenizers(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[Difference]:
    old, new = saved["tokenizer_sha256"], identity["tokenizer_sha256"]
    before, now = (known.get("pre_tokenizer", "none") for known in (saved, identity))
    if before != now:
        yield Difference(flag="--pre-tokenizer", old=before, new=now, override="override_tokenizer")
    elif old != new:
        yield Difference(
            flag="--tokenizer-model",
            old=f"of checksum {old[:12]}",
            new=f"one of {new[:12]}",
            override="override_tokenizer",
        )


def _compare_text(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[Difference]:
    """At most one: the first data set that is another, or another part of it, or weighs otherwise."""
    old, new = saved["text"], identity["text"]
    if len(old) != len(new):
        yield Difference(
            flag="--data-path", old=f"of {len(old)} data sets", new=str(len(new)), override="override_data"
        )
        return
    for before, now in zip(old, new, strict=True):
        for key, flag in (("sha256", "--data-path"), ("documents", "--split"), ("share", "--data-path")):
            if before[key] != now[key]:
                described = [f"{text['prefix']} with {key} {_show_text(text[key])}" for text in (before, now)]
                yield Difference(flag=flag, old=described[0], new=described[1], override="override_data")
                return


def _show_text(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]} to {value[1]}"
    return value[:12] if isinstance(value, str) else f"{value:.4%}"


def _check_step_count(run: RunConfig, start: Start) -> None:
    """What is counted in samples from the start of the run on must agree with the steps taken.

    After --override-batch-size it no longer does.
    """
    consumed = start.document["train"]["consumed_samples"]
    counted = count_completed_steps(run.training, consumed)
    if counted == start.iteration:
        return
    for flag, value, instead in (
        ("--train-samples", run.training.train_samples, "give --train-iters"),
        ("--mask-prob-schedule", run.objective.mask_prob_schedule, "give a constant --mask-prob"),
    ):
        if value is not None:
            raise CheckpointError(
                f"{flag} {value} counts steps of this batch size from the start of the run, but {start.step} took "
                f"{consumed} samples in {start.iteration} steps, not {counted}; {instead}"
            )

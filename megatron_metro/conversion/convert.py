"""A model from one format into another: read, written under a temporary name, read again, compared, renamed."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_metro.analysis.cost import main_model
from megatron_metro.checkpoint.folder import discard
from megatron_metro.checkpoint.release import check_release_folder
from megatron_metro.config import files
from megatron_metro.config.errors import CheckpointError, ConfigError
from megatron_metro.config.fields import Value
from megatron_metro.config.schema import ModelConfig
from megatron_metro.conversion import fairseq, hf_bart, hf_metro_t0, hf_t5, megatron_lm_t5
from megatron_metro.conversion.foreign import Foreign, read_folder, write_files
from megatron_metro.conversion.own import read_step, write_step
from megatron_metro.conversion.weights import Source, TensorFile, compare_weights
from megatron_metro.model.weights import weight_shapes

LOGGER = logging.getLogger(__name__)

OWN = "megatron"
FOREIGN: dict[str, Foreign] = {form.name: form for form in (hf_t5.FORMAT, hf_metro_t0.FORMAT, hf_bart.FORMAT)}
_IMPORTS: dict[str, Callable[[Path, Mapping[str, Value]], Source]] = {
    **{name: partial(read_folder, form) for name, form in FOREIGN.items()},
    fairseq.NAME: fairseq.read_file,
    megatron_lm_t5.NAME: megatron_lm_t5.read_folder,
}
SOURCES, TARGETS = (OWN, *_IMPORTS), (OWN, *FOREIGN)
# What, beside its weights, makes a main model compute what it does; dropout and initial weights do not.
_ARCHITECTURE = (
    *("vocab_size", "hidden_size", "ffn_hidden_size", "num_attention_heads", "head_size", "activation"),
    *("encoder_num_layers", "decoder_num_layers", "add_bias_linear", "softmax_scale", "lm_head", "scale_lm_output"),
    *("norm_placement", "normalization", "norm_epsilon", "untie_embeddings_and_output_weights"),
    *("position_embedding_type", "relative_attention", "relative_attention_decoder"),
)
_BIAS_TABLES = tuple(f"relative_attention_{name}" for name in ("bucket", "num_buckets", "max_distance"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What is to be done."""

    source: str  # one of SOURCES
    target: str  # one of TARGETS
    input: Path
    output: Path
    step: int | None = None  # of our own checkpoints; the newest when not given
    settings: Mapping[str, Value] = field(default_factory=dict)  # by field name; they win over what the input says


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two that a conversion makes equal."""

    form: str  # one of SOURCES
    model: Source
    place: Path  # where it lies now


Check = Callable[[Side, Side], None]  # called with both before the output has its name


def convert(conversion: Conversion, check: Check | None = None) -> int:
    """Write the output and return how many weights it has; with an error there is none under its name.

    Raises CheckpointError, ConfigError, DataError, StorageError, and UnsafeError for what would run code.
    """
    check_output(conversion)
    source = open_source(conversion.source, conversion.input, conversion.step, conversion.settings)
    form = FOREIGN.get(conversion.target)
    if form is not None:
        source = keep_main_model(source, form.name)

    def compare(written: Source, place: Path) -> None:
        _compare_architectures(written.run.model, source.run.model, place)
        compare_weights(written.weights, source.weights, place)
        if check is not None:
            original = Side(form=conversion.source, model=source, place=source.place)
            check(original, Side(form=conversion.target, model=written, place=place))

    if form is not None:
        _write_foreign(form, source, conversion.output, compare)
    else:
        write_step(
            source,
            conversion.output,
            conversion.source,
            lambda written, place: compare(replace(source, weights=written), place),
        )
    return len(source.weights.names())


def check_output(conversion: Conversion) -> None:
    """Refuse an output that exists, before anything is read. Raises CheckpointError."""
    if conversion.target == OWN:
        check_release_folder(conversion.output)
    elif conversion.output.exists():
        raise CheckpointError(f"--output {conversion.output}: exists already and is never overwritten; name another")


def open_source(name: str, path: Path, step: int | None, settings: Mapping[str, Value]) -> Source:
    """A model in one of SOURCES, its configuration and the names and shapes of its weights checked."""
    if name == OWN:
        return read_step(path, step, settings)
    if step is not None:
        raise ConfigError(f"--step {step} names an iteration of --from {OWN}, found --from {name}; drop it")
    return _IMPORTS[name](path, settings)


def keep_main_model(source: Source, target: str) -> Source:
    """The encoder-decoder alone, which is what other programs have; what is left out is said."""
    model = source.run.model
    if not model.has_decoder:
        raise ConfigError(f"--to {target}: has a decoder, found --decoder-num-layers 0; convert another run")
    main = replace(main_model(model), rtd_head="none")
    kept = weight_shapes(main)
    if left_out := [name for name in source.weights.names() if name not in kept]:
        networks = sorted({name.split(".")[0] for name in left_out})
        LOGGER.warning("--to %s: leaves out %d weights of %s", target, len(left_out), ", ".join(networks))
    return replace(source, run=replace(source.run, model=main), weights=_Selection(source.weights, tuple(kept)))


class _Selection:
    """Some of the weights of a source."""

    def __init__(self, weights: TensorFile, names: tuple[str, ...]) -> None:
        self._names = names
        self.shape, self.dtype, self.read = weights.shape, weights.dtype, weights.read

    def names(self) -> tuple[str, ...]:
        """Those that are left."""
        return self._names


def _write_foreign(form: Foreign, source: Source, output: Path, compare: Callable[[Source, Path], None]) -> None:
    """Write a folder, read it as any other input of its format, compare, rename."""
    with files.refusing_writes(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        try:
            temporary.chmod(0o777 & ~files.current_umask())
            write_files(form, source, temporary)
            compare(read_folder(form, temporary, _repeat_settings(source)), temporary)
            for path in temporary.iterdir():
                files.synchronise(path)
            files.publish(temporary, output)
        finally:
            discard(temporary)


def _compare_architectures(written: ModelConfig, expected: ModelConfig, place: Path) -> None:
    """Raise CheckpointError where a configuration, read again, describes another function of the same weights."""
    names = [*_ARCHITECTURE, *(_BIAS_TABLES if expected.relative_attention != "none" else ())]
    for name in names:
        if getattr(written, name) != getattr(expected, name):
            raise CheckpointError(
                f"{place}: says {name} {getattr(written, name)} where {getattr(expected, name)} was written; this "
                "model has no place in the format"
            )


def _repeat_settings(source: Source) -> dict[str, Value]:
    """What a run needs to be legal and its files do not say; none of it touches a weight."""
    values: dict[str, Value] = {"objective": "prefix-lm", "encoder_seq_length": source.run.data.encoder_seq_length}
    if source.tokenizer is None:
        values["vocab_extra_ids"] = source.run.tokenizer.vocab_extra_ids
    return values

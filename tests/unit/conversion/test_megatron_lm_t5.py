"""megatron-core's own T5, saved by core's planner with byte items beside its tensors, imported and compared."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_metro.checkpoint.tensor_index import read_index
from megatron_metro.config.errors import CheckpointError, ConfigError, UnsafeError
from megatron_metro.conversion.convert import Conversion, convert
from megatron_metro.conversion.logits import LogitCheck
from megatron_metro.conversion.whole_model import load_model
from megatron_metro.tokenizer import NullTokenizer
from tests.helpers import conversions, hostile, tiny

ROWS, VOCAB_SIZE = 320, 307  # padded, and in use
STEP = "iter_0000007"
SIZES = {
    "generator_num_layers": 0,
    "norm_placement": "pre",
    "activation": "gelu",
    "relative_attention": "none",
    "encoder_num_layers": 3,
    "decoder_num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "ffn_hidden_size": 40,
    "max_position_embeddings": 37,
    "vocab_size": ROWS,
}


def make_core(groups, **changes):
    from megatron_metro.device import activate
    from megatron_metro.model.core_t5 import build_core_t5

    activate("cpu").seed_all(3)  # core asks for its random states even where nothing is dropped
    core = build_core_t5(tiny.tiny_model(**{**SIZES, **changes}), groups)
    conversions.perturb(core)
    return core


def save_core(core, folder, *, has_layers_apart=False, command="true"):
    """As Megatron-LM does: layers along a first dimension or apart, random states as objects, an optimizer's moment."""
    state = core.sharded_state_dict(metadata={"non_homogeneous_layers": has_layers_apart})
    state["rng_state"] = ShardedObject("rng_state", [hostile.make_call(command)], (1,), (0,))
    moment = torch.zeros(ROWS, 24)
    from megatron.core.dist_checkpointing import ShardedTensor

    key = "optimizer.state.exp_avg.embedding.word_embeddings.weight"
    state[key] = ShardedTensor.from_rank_offsets(key, moment)
    prepared, _ = save_preprocess(state)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(prepared, keep_only_main_replica=True)
    (folder / STEP).mkdir(parents=True)
    save(
        mcore_to_pyt_state_dict(by_key, is_loading=False),
        storage_writer=FileSystemWriter(folder / STEP),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def convert_core(folder, output, **changes):
    settings = {"num_attention_heads": 3, "vocab_size": VOCAB_SIZE, **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    check = LogitCheck(2)
    paths = {"input": folder, "output": output}
    convert(Conversion(source="megatron-lm-t5", target="megatron", **paths, settings=settings), check)
    assert check.report.startswith("; logits of 2 inputs differ by")
    return output


@pytest.mark.parametrize("changes", [{}, {"untie_embeddings_and_output_weights": True}], ids=["tied", "untied"])
@pytest.mark.parametrize("has_layers_apart", [False, True], ids=["stacked", "apart"])
def test_it_computes_what_core_computes(changes, has_layers_apart, groups, tmp_path):
    from megatron_metro.model.core_t5 import run_core_t5

    core, canary = make_core(groups, **changes), tmp_path / "canary"
    folder = save_core(core, tmp_path / "theirs", has_layers_apart=has_layers_apart, command=f"touch {canary}")
    ours = convert_core(folder if has_layers_apart else folder / STEP, tmp_path / "ours")
    piece = load_model(ours, tokenizer=NullTokenizer(VOCAB_SIZE - 100, 100), device="cpu")
    assert piece.context.model.lm_head == ("linear" if changes else "linear-bias")
    tokens, _, decoder_tokens = conversions.make_inputs(is_padded=False, pad_id=1)
    with torch.no_grad():
        expected = run_core_t5(core, tokens, decoder_tokens)[..., :VOCAB_SIZE]
    found = conversions.compute_ours(piece, tokens, None, decoder_tokens)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not canary.exists()


def test_byte_items_are_passed_over_on_demand_alone(groups, tmp_path):
    folder = save_core(make_core(groups), tmp_path / "theirs")
    with pytest.raises(UnsafeError, match=r"(rng_state|_extra_state)/shard_\S+ is a byte item"):
        read_index(folder / STEP)
    names = read_index(folder / STEP, passes_over_bytes=True)
    assert "embedding.word_embeddings.weight" in names and not any("rng_state" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_attention_heads": None}, ConfigError, "--num-attention-heads"),
        ({"num_attention_heads": 5}, ConfigError, "--num-attention-heads 5 does not divide 24"),
        ({"vocab_size": 321}, CheckpointError, r"word_embeddings\.weight has shape \[320, 24\]"),
        ({"norm_placement": "post"}, CheckpointError, "no place for decoder.embedding_norm"),
        ({"activation": "gated-gelu"}, CheckpointError, r"linear_fc1\.weight has shape"),
    ],
    ids=["no heads", "odd heads", "too many ids", "other norms", "gates"],
)
def test_what_does_not_fit_is_refused(changes, error, words, groups, tmp_path):
    folder = save_core(make_core(groups), tmp_path / "theirs")
    with pytest.raises(error, match=words):
        convert_core(folder, tmp_path / "ours", **changes)
    assert not (tmp_path / "ours").exists()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither"):
        convert_core(tmp_path, tmp_path / "ours")

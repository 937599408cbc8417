"""Random models in foreign formats, and what conversion makes of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from megatron_metro.config.fields import Value
from megatron_metro.conversion.convert import Conversion, convert
from megatron_metro.conversion.fairseq_t5 import FairseqT5Config, FairseqT5ForConditionalGeneration
from megatron_metro.conversion.whole_model import load_model
from megatron_metro.model.piece import ChainPiece
from megatron_metro.tokenizer import NullTokenizer

VOCAB_SIZE = 307  # odd, as all sizes that may be
NUM_SENTINELS = 40
SETTINGS: dict[str, Value] = {"vocab_extra_ids": NUM_SENTINELS}
T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "d_model": 22, "d_kv": 5, "d_ff": 35, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 19, "decoder_start_token_id": 0,
}  # fmt: skip
T5_MODELS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.0, deeper decoder": {"num_layers": 1, "num_decoder_layers": 3},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 7},
    "v1.1, deeper encoder": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
}
BART_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "d_model": 21, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 35,
    "decoder_ffn_dim": 35, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 37,
    "activation_function": "relu",
}  # fmt: skip
METRO_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "d_model": 21, "d_kv": 5, "d_ff": 35, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "max_positions": 37,
}  # fmt: skip


def perturb(network: nn.Module) -> None:
    """No weight is what it starts with: zeros and ones would hide that two change places."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)


def make_t5(**changes: Any) -> T5ForConditionalGeneration:
    """A random T5, in v1.1 with a head matrix of its own."""
    network = T5ForConditionalGeneration(T5Config(**{**T5_SIZES, **changes})).eval()
    if changes.get("tie_word_embeddings") is False:  # transformers 5 ties it whatever the configuration says
        network.lm_head.weight = nn.Parameter(torch.randn_like(network.lm_head.weight))
    perturb(network)
    return network


def make_bart(**changes: Any) -> BartForConditionalGeneration:
    """A random BART."""
    network = BartForConditionalGeneration(BartConfig(**{**BART_SIZES, **changes})).eval()
    perturb(network)
    return network


def make_metro(**changes: Any) -> FairseqT5ForConditionalGeneration:
    """A random METRO-T0."""
    network = FairseqT5ForConditionalGeneration(FairseqT5Config(**{**METRO_SIZES, **changes})).eval()
    perturb(network)
    return network


def convert_to_ours(form: str, folder: Path, output: Path, **settings: Value) -> Path:
    """Import a folder."""
    changes = SETTINGS | settings
    convert(Conversion(source=form, target="megatron", input=folder, output=output, settings=changes))
    return output


def convert_back(form: str, folder: Path, output: Path) -> Path:
    """Export a run."""
    convert(Conversion(source="megatron", target=form, input=folder, output=output))
    return output


def load_ours(folder: Path) -> ChainPiece:
    """The imported model in this process."""
    return load_model(folder, tokenizer=NullTokenizer(VOCAB_SIZE - NUM_SENTINELS, NUM_SENTINELS), device="cpu")


@torch.no_grad()
def compute_ours(piece: ChainPiece, tokens: Tensor, padding: Tensor | None, decoder_tokens: Tensor) -> Tensor:
    """Logits [b, t, v] for ids [b, s] and [b, t]."""
    state = piece.start_writing(piece.read_source(tokens, padding, None), padding)
    hidden_TBH = piece.write(decoder_tokens, None, state)
    return torch.stack([piece.project(rows)[:, :VOCAB_SIZE] for rows in hidden_TBH.transpose(0, 1)])


@torch.no_grad()
def compute_theirs(network: nn.Module, tokens: Tensor, padding: Tensor | None, decoder_tokens: Tensor) -> Tensor:
    """The same by a model of transformers."""
    mask = None if padding is None else (~padding).long()
    return network(input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder_tokens).logits


def make_inputs(*, is_padded: bool, pad_id: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids of three sources and of their targets, and where the sources are padding."""
    tokens, decoder_tokens = torch.randint(5, VOCAB_SIZE, (3, 21)), torch.randint(5, VOCAB_SIZE, (3, 9))
    if not is_padded:
        return tokens, None, decoder_tokens
    padding = torch.arange(21) >= torch.tensor([21, 13, 5])[:, None]
    return tokens.masked_fill(padding, pad_id), padding, decoder_tokens


def assert_same_logits(piece: ChainPiece, network: nn.Module, pad_id: int, tolerance: float = 1e-5) -> None:
    """Both sides agree, with and without padding, and say something."""
    for is_padded in (False, True):
        inputs = make_inputs(is_padded=is_padded, pad_id=pad_id)
        ours, theirs = compute_ours(piece, *inputs), compute_theirs(network, *inputs)
        assert float(theirs.std()) > 0.1
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def change(folder: Path, name: str, value: Any) -> None:
    """Another setting in a folder's config.json."""
    import json

    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

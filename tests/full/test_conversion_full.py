"""Random models of random, odd sizes in every Hugging Face format, to ours and back: bits, and logits of both sides."""

import random
from typing import Any

import pytest

from tests.helpers import conversions
from tests.helpers.conversions import make_bart, make_metro, make_t5

pytestmark = pytest.mark.full

NUM_MODELS = 40
MAKERS = {"hf-t5": (make_t5, 0), "hf-bart": (make_bart, 1), "hf-metro-t0": (make_metro, 1)}


def draw_sizes(form: str, rng: random.Random) -> dict[str, Any]:
    """Depths, widths and heads; in a T5 its version, in the others their activation."""
    heads, head_size, width = rng.randint(1, 5), rng.randint(1, 9), rng.randint(3, 40)
    depths, ffn = (rng.randint(1, 4), rng.randint(1, 4)), rng.randint(1, 50)
    if form == "hf-bart":
        sizes = {"d_model": heads * head_size, "encoder_layers": depths[0], "decoder_layers": depths[1]}
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_attention_heads": heads, f"{side}_ffn_dim": ffn}
        activation = rng.choice(["relu", "gelu"])
        return {**sizes, "max_position_embeddings": rng.randint(21, 60), "activation_function": activation}
    sizes = {"d_model": width, "d_kv": head_size, "num_heads": heads, "d_ff": ffn, "num_layers": depths[0]}
    sizes |= {"num_decoder_layers": depths[1], "relative_attention_num_buckets": 4 * rng.randint(1, 6)}
    sizes["relative_attention_max_distance"] = sizes["relative_attention_num_buckets"] + rng.randint(2, 40)
    if form == "hf-metro-t0":
        return {**sizes, "max_positions": rng.randint(21, 60), "feed_forward_proj": rng.choice(["relu", "gelu"])}
    untied = {"tie_word_embeddings": False, "feed_forward_proj": rng.choice(["relu", "gated-gelu"])}
    return sizes | (untied if rng.random() < 0.5 else {"feed_forward_proj": rng.choice(["relu", "gelu", "gated-gelu"])})


@pytest.mark.parametrize("form", MAKERS)
def test_there_and_back(form, groups, tmp_path, record_property):
    rng, (make, pad_id) = random.Random(f"sizes of {form}"), MAKERS[form]
    for number in range(NUM_MODELS):
        network = make(**draw_sizes(form, rng))
        folder = tmp_path / str(number)
        network.save_pretrained(folder / "theirs")
        ours = conversions.convert_to_ours(form, folder / "theirs", folder / "ours")
        conversions.assert_same_logits(conversions.load_ours(ours), network, pad_id=pad_id)
        back = type(network).from_pretrained(conversions.convert_back(form, ours, folder / "back"))
        conversions.assert_same_tensors(back.state_dict(), network.state_dict())
    record_property(f"random models there and back, {form}", NUM_MODELS)

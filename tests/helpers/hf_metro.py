"""METRO written with Hugging Face transformers, the way a user would: the peer of the step benchmark.

BART's layers are METRO's (Post-LN, biases, ReLU, learned positions, embedding norm). What BART lacks, the relative bias
of encoder and generator, goes in as an additive attention mask per layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.models.t5.modeling_t5 import T5Attention

from megatron_metro.batch import Microbatch
from megatron_metro.config.schema import ModelConfig, RunConfig

IGNORED = -100


class BiasedEncoder(nn.Module):
    """A BART encoder with one relative bias table per layer."""

    def __init__(self, config: BartConfig, model: ModelConfig, words: nn.Embedding, num_layers: int) -> None:
        super().__init__()
        self.buckets, self.distance = model.relative_attention_num_buckets, model.relative_attention_max_distance
        self.encoder = BartEncoder(config)
        self.encoder.layers = self.encoder.layers[:num_layers]
        self.encoder.embed_tokens = words
        tables = [nn.Embedding(self.buckets, model.num_attention_heads) for _ in range(num_layers)]
        self.bias_tables = nn.ModuleList(tables)
        for table in tables:
            nn.init.zeros_(table.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, s] ids to [b, s, h]."""
        positions = torch.arange(tokens.shape[1])
        # METRO's bucket formula differs in its rounding; the work is the same.
        buckets = T5Attention._relative_position_bucket(
            positions[None, :] - positions[:, None], True, self.buckets, self.distance
        )
        embedded = self.encoder.embed_tokens(tokens) + self.encoder.embed_positions(tokens)
        hidden = self.encoder.layernorm_embedding(embedded)
        hidden = functional.dropout(hidden, self.encoder.dropout, self.training)
        for layer, table in zip(self.encoder.layers, self.bias_tables):
            bias = table(buckets).permute(2, 0, 1)[None]
            output = layer(hidden, attention_mask=bias.expand(len(tokens), -1, -1, -1))
            hidden = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5
        return hidden


class DenseNorm(nn.Module):
    """Dense, ReLU, norm: what METRO's MLM and RTD heads start with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] to [..., h]."""
        return self.norm(functional.relu(self.dense(hidden)))


class HfMetro(nn.Module):
    """Generator, main model and the three losses; vocabulary heads on all positions unless `masked_heads`."""

    def __init__(self, model: ModelConfig, *, masked_heads: bool) -> None:
        super().__init__()
        assert model.vocab_size is not None
        config = BartConfig(
            vocab_size=model.vocab_size, d_model=model.hidden_size,
            encoder_layers=max(model.encoder_num_layers, model.generator_num_layers),
            decoder_layers=model.decoder_num_layers,
            encoder_attention_heads=model.num_attention_heads, decoder_attention_heads=model.num_attention_heads,
            encoder_ffn_dim=model.ffn_hidden_size, decoder_ffn_dim=model.ffn_hidden_size, activation_function="relu",
            dropout=model.hidden_dropout, attention_dropout=model.attention_dropout, use_cache=False,
            max_position_embeddings=model.max_position_embeddings,
        )  # fmt: skip
        self.masked_heads, self.pad_id = masked_heads, 1
        self.main = BartForConditionalGeneration(config)
        words = self.main.model.shared
        self.encoder = BiasedEncoder(config, model, words, model.encoder_num_layers)
        self.generator = BiasedEncoder(config, model, words, model.generator_num_layers)
        del self.main.model.encoder
        for module in self.generator.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = model.generator_dropout
        self.mlm_head, self.rtd_head = DenseNorm(model.hidden_size), DenseNorm(model.hidden_size)
        self.mlm_bias = nn.Parameter(torch.zeros(model.vocab_size))
        self.rtd_output = nn.Linear(model.hidden_size, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The objective of a batch made by `label_batch`."""
        labels, is_masked = batch["labels"], batch["labels"] != IGNORED
        words = self.main.model.shared.weight
        generated = self.generator(batch["generator_tokens"])
        kept = is_masked if self.masked_heads else torch.ones_like(is_masked)
        logits = functional.linear(self.mlm_head(generated[kept]), words, self.mlm_bias)
        mlm_loss = functional.cross_entropy(logits, labels[kept], ignore_index=IGNORED)

        masked_logits = logits.detach()[is_masked[kept]]
        sampled = torch.multinomial(masked_logits.softmax(-1), 1).squeeze(-1)
        corrupted = batch["encoder_tokens"].masked_scatter(is_masked, sampled)
        encoded = self.encoder(corrupted)
        verdicts = self.rtd_output(self.rtd_head(encoded)).squeeze(-1)
        is_replaced = (corrupted != batch["encoder_tokens"]).to(verdicts.dtype)
        rtd_loss = functional.binary_cross_entropy_with_logits(verdicts, is_replaced)

        decoded = self.main.model.decoder(
            input_ids=batch["decoder_tokens"], encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        lm_logits = functional.linear(decoded[kept], words)
        lm_loss = functional.cross_entropy(lm_logits, labels[kept], ignore_index=IGNORED)
        return mlm_loss + 50.0 * rtd_loss + lm_loss


def label_batch(microbatch: Microbatch) -> dict[str, Tensor]:
    """A METRO microbatch as Hugging Face users hold it: ids and labels [b, s], -100 where nothing is predicted."""
    slots, ids, valid = microbatch.masked_slots, microbatch.masked_ids, microbatch.masked_valid
    assert slots is not None and ids is not None and valid is not None and microbatch.generator_tokens is not None
    b, s = microbatch.encoder_tokens.shape
    labels = torch.full((b, s + 1), IGNORED).scatter(1, slots, torch.where(valid, ids, IGNORED))[:, :s]
    return {
        "encoder_tokens": microbatch.encoder_tokens,
        "decoder_tokens": microbatch.decoder_tokens,
        "generator_tokens": microbatch.generator_tokens,
        "labels": labels.contiguous(),
    }


def build_hf_step(run: RunConfig, microbatch: Microbatch, *, masked_heads: bool = False) -> Callable[[], float]:
    """One training step (forward, backward, fused AdamW as transformers' Trainer uses); returns the loss."""
    torch.manual_seed(run.training.seed)
    metro = HfMetro(run.model, masked_heads=masked_heads).train()
    settings = run.optimizer
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(
        metro.parameters(), lr=settings.lr, betas=betas, eps=settings.adam_eps, weight_decay=settings.weight_decay,
        fused=True,
    )  # fmt: skip
    batch = label_batch(microbatch)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = metro(batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step

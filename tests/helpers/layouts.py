"""Every way to lay a run over a few processes, as rows of the parity matrix."""

from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, product
from typing import Any, Literal

import torch

from megatron_metro.config.chain import build_chain
from megatron_metro.config.objectives import PRETRAINING
from megatron_metro.config.schema import DataConfig, ModelConfig, ObjectiveConfig, ParallelConfig, RunConfig
from megatron_metro.config.terms import follow_objective
from megatron_metro.parallel.layout import StageLayout
from tests.helpers import tiny
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Case

# What FP32 rows change of design section 5. At its lr 1e-3 one rounding of a norm weight near 1 (1.2e-7) already is
# 2.4e-5 of the five-step update 5e-3. And Adam turns the rounding noise of gradients that are zero in theory (those of
# key biases) into updates of full size unless epsilon stands well above that noise.
FP32_OPTIMIZER = {"lr": 1e-1, "adam_eps": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: where the model and the batch go, and what is special about the run."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    micro_batch_size: int = 2
    distributed_optimizer: bool = False  # in FP32: core's distributed optimizer refuses float64
    single_precision: bool = False  # FP32 without it too
    overlap: bool = False  # of gradient reduction, and of the parameter gather under the distributed optimizer
    recompute: str | None = None
    padded: bool = False
    spans: bool = False
    made: bool = False  # batches that the objective itself makes of random text, in the networks it needs
    pairs: Literal["padded", "packed"] | None = None  # examples of fine-tuning; the reference has one a row
    few_ids: bool = False  # so few that the generator often fills in the original
    layout: str | None = None
    num_steps: int = 5
    model: dict[str, Any] = field(default_factory=dict)
    model_name: str | None = None  # stands for `model` in the row's name
    objective: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_microbatches(self) -> int:
        return GLOBAL_BATCH_SIZE // (self.micro_batch_size * self.dp)

    @property
    def name(self) -> str:
        """Short, for test ids and tables."""
        parts = [f"tp{self.tp}{'sp' if self.sp else ''}", f"pp{self.pp}x{self.vpp}", f"dp{self.dp}"]
        parts.append(f"m{self.num_microbatches}")
        parts += ["dist-opt"] if self.distributed_optimizer else ["fp32"] if self.single_precision else []
        parts += ["overlap"] if self.overlap else []
        parts += [self.recompute] if self.recompute else []
        parts += ["padded"] if self.padded else []
        parts += ["spans"] if self.spans else []
        parts += [self.pairs] if self.pairs else []
        parts += ["few ids"] if self.few_ids else []
        parts += [self.layout] if self.layout else []
        parts += [self.model_name] if self.model_name else [f"{k}={v}" for k, v in self.model.items()]
        parts += [f"{k}={v}" for k, v in (self.objective | self.optimizer).items()]
        return " ".join(parts)

    @property
    def is_single(self) -> bool:
        return self.distributed_optimizer or self.single_precision

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_single else torch.float64

    @property
    def tolerance(self) -> float:
        """Design section 5: float64 1e-9; FP32 1e-5 where core refuses float64."""
        return 1e-5 if self.is_single else 1e-9

    def case(self) -> Case:
        """What the processes run."""
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.sp,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vpp,
            use_distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and self.distributed_optimizer,
            recompute_granularity=self.recompute,  # type: ignore[arg-type]
        )
        return self._case(parallel)

    def reference(self) -> Case:
        """The same numbers on one process, in one microbatch."""
        pairs: Literal["padded"] | None = "padded" if self.pairs else None
        alone = replace(self, micro_batch_size=GLOBAL_BATCH_SIZE, layout=None, pairs=pairs)
        return alone._case(ParallelConfig())

    def reference_key(self) -> str:
        """Rows with equal keys share a reference."""
        batches = (self.num_steps, self.padded, self.spans, self.made, self.pairs is not None, self.few_ids)
        return repr((self.dtype, batches, self.model, self.objective, self.optimizer))

    def _case(self, parallel: ParallelConfig) -> Case:
        model: ModelConfig = tiny.tiny_model(**self.model)
        optimizer = self.optimizer or (FP32_OPTIMIZER if self.is_single else {})
        run = tiny.tiny_run(model, parallel, ObjectiveConfig(**self.objective), **optimizer)
        return Case(
            run=_follow(run) if self.made else run,
            micro_batch_size=self.micro_batch_size,
            dtype=self.dtype,
            num_steps=self.num_steps,
            padded=self.padded,
            spans=self.spans,
            made=self.made,
            pairs=self.pairs,
            few_ids=self.few_ids,
            layout=self.layout,
        )


def _follow(run: RunConfig) -> RunConfig:
    """The run with the networks, loss weights and lengths of its objective; tensor-parallel pairs share the lengths."""
    length = 24 if run.objective.objective in ("t5-span", "spactor") else tiny.LENGTH
    return replace(follow_objective(run, tiny.tiny_run(), ()), data=DataConfig(encoder_seq_length=length))


# Three ranks share six heads; the sequences of 16 tokens are in no three parts, so without sequence parallelism.
DIVISIBLE_BY_THREE = {"hidden_size": 24, "ffn_hidden_size": 48, "num_attention_heads": 6}


def all_rows(world_size: int) -> list[Row]:
    """Every (TP, SP, PP, VPP, DP, number of microbatches) of so many processes that megatron-core's schedules take."""
    rows = []
    for tp, pp in product((1, 2, 3, 4), (1, 2, 3, 4)):
        if world_size % (tp * pp):
            continue
        dp = world_size // (tp * pp)
        for sp, vpp, size in product((False, True), (1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 12)):
            count, rest = divmod(GLOBAL_BATCH_SIZE, size * dp)
            if rest or count == 0 or (sp and tp in (1, 3)) or (vpp > 1 and (pp == 1 or count % pp)):
                continue
            if pp * vpp > 11:  # the tiny chain has 11 units
                continue
            model = DIVISIBLE_BY_THREE if tp == 3 else {}
            name = "six heads" if tp == 3 else None
            rows.append(Row(tp=tp, sp=sp, pp=pp, vpp=vpp, dp=dp, micro_batch_size=size, model=model, model_name=name))
    return rows


def overlap_rows(world_size: int) -> list[Row]:
    """Every row with data parallelism again, in three ways of reducing gradients."""
    return [
        replace(row, distributed_optimizer=distributed_optimizer, overlap=overlap)
        for row in all_rows(world_size)
        for distributed_optimizer, overlap in ((False, True), (True, False), (True, True))
        if row.dp > 1
    ]


# What a run may be besides its layout.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"recompute": "selective"},
    {"recompute": "full"},
    {"padded": True},
    {"padded": True, "recompute": "full"},
    {"spans": True, "model": {"generator_num_layers": 0}},
    {"model": {"generator_embedding_sharing": "token_pos_norm"}},
    {"padded": True, "model": {"rtd_head": "simple"}},
    {"model": {"rtd_head": "none"}},
    {"model": {"mlm_head": "linear"}},
    {"objective": {"weighted_lm_loss": True}},
    {"few_ids": True},
    {
        "model_name": "bias per stack",
        "model": {"relative_attention": "per_stack", "relative_attention_decoder": True},
    },
    {
        "model_name": "untied, unequal depths",
        "model": {"untie_embeddings_and_output_weights": True, "decoder_num_layers": 1, "encoder_num_layers": 3},
    },
    {"spans": True, "model_name": "T5", "model": tiny.T5_V1_0},
    {"spans": True, "model_name": "T5 v1.1", "model": tiny.T5_V1_1},
    {"model_name": "SPACTOR", "model": tiny.SPACTOR},
    # Four ranks share four heads.
    {
        "padded": True,
        "model_name": "narrow generator",
        "model": {**tiny.NARROW_GENERATOR, "generator_num_attention_heads": 4},
    },
)

# Objectives and ablations beside METRO; tests/parity/test_variants.py holds their definitions.
OBJECTIVE_VARIANTS: dict[str, dict[str, Any]] = {
    "spactor": {"objective": {"objective": "spactor", "rtd_loss_weight": 10.0, "lm_loss_weight": 10.0}},
    "RTD on the decoder": {
        "padded": True,
        "model": {"rtd_position": "decoder"},
        "objective": {"weighted_lm_loss": True},
    },
    "RoBERTa's LM head, masked tokens only": {
        "model": {"lm_head": "roberta", "copy_mechanism": True},
        "objective": {"lm_targets": "masked-only"},
    },
    "copies, all positions": {
        "padded": True,
        "model": {"copy_mechanism": True, "rtd_position": "decoder"},
        "objective": {"lm_targets": "all"},
    },
    "electra": {"model": {"decoder_num_layers": 0, "encoder_num_layers": 3}, "objective": {"objective": "electra"}},
    "coco-lm": {
        "model": {
            "decoder_num_layers": 0,
            "encoder_lm_head": True,
            "copy_mechanism": True,
            "lm_head": "roberta",
            "norm_placement": "pre",
        },
        "objective": {"objective": "electra"},
    },
}

# Layouts in which every variant runs.
VARIANT_PLACES = (
    Row(),
    Row(tp=2),
    Row(tp=2, sp=True),
    Row(dp=2),
    Row(pp=2),
    Row(pp=2, vpp=2),
    Row(pp=3),
    Row(pp=3, vpp=2),
    Row(tp=4, sp=True),
    Row(tp=2, sp=True, pp=2),
    Row(tp=2, sp=True, pp=2, vpp=3),
    Row(tp=2, sp=True, dp=2),
    Row(pp=2, vpp=2, dp=2, micro_batch_size=1),
    Row(pp=4),
    Row(pp=4, vpp=2, micro_batch_size=3),
)


def variant_rows(world_size: int) -> list[Row]:
    """Every variant in each of the chosen layouts of so many processes."""
    places = [row for row in VARIANT_PLACES if row.world_size == world_size]
    named = [{"model_name": name, **variant} for name, variant in OBJECTIVE_VARIANTS.items()]
    rows = [replace(place, **variant) for place, variant in product(places, [*VARIANTS, *named])]
    # Without a generator there are fewer units than the most pieces.
    return [row for row in rows if row.pp * row.vpp <= len(build_chain(row.case().run.model))]


# Where every objective trains on batches of its own, on METRO's architecture and on T5's.
OBJECTIVE_PLACES = (
    Row(tp=2),
    Row(tp=2, sp=True),
    Row(pp=2),
    Row(pp=2, vpp=2),
    Row(dp=2),
    Row(tp=2, sp=True, pp=2),
    Row(tp=2, pp=2, vpp=2, micro_batch_size=3),
    Row(pp=2, dp=2),
)
ARCHITECTURES: dict[str, dict[str, Any]] = {"METRO": {}, "T5": tiny.SPACTOR}


def made_row(place: Row, objective: str, architecture: str) -> Row:
    """Two steps of an objective on batches that it makes itself."""
    return replace(
        place,
        made=True,
        num_steps=2,
        model=ARCHITECTURES[architecture],
        model_name=f"made on {architecture}",
        objective={"objective": objective},
    )


def objective_rows(world_size: int) -> list[Row]:
    """Every objective on both architectures in each of the chosen layouts of so many processes."""
    places = [place for place in OBJECTIVE_PLACES if place.world_size == world_size]
    return [made_row(*row) for row in product(places, PRETRAINING, ARCHITECTURES)]


def cut_rows(pp: int, vpp: int) -> list[Row]:
    """Every cut of the tiny chain of 11 units into pp x vpp pieces: the generator lies on one, two or three stages."""
    chain = build_chain(tiny.tiny_model())
    rows = []
    for cuts in combinations(range(1, len(chain)), pp * vpp - 1):
        pieces = tuple(chain[start:end] for start, end in pairwise((0, *cuts, len(chain))))
        text = StageLayout(pieces=pieces, pp_size=pp, vpp_size=vpp).format()
        rows.append(Row(pp=pp, vpp=vpp, layout=text, num_steps=2))
    return rows


def matrix() -> dict[str, list[Row]]:
    """The complete matrix up to four processes; the rows of a group run on one number of processes."""
    groups = {}
    for world_size in (1, 2, 3, 4):
        groups[f"{world_size}: every layout"] = all_rows(world_size)
        groups[f"{world_size}: overlap and distributed optimizer"] = overlap_rows(world_size)
        groups[f"{world_size}: models, objectives, recomputation"] = variant_rows(world_size)
        groups[f"{world_size}: batches of every objective"] = objective_rows(world_size)
        if world_size in (2, 3):
            for vpp in range(1, 11 // world_size + 1):
                groups[f"{world_size}: every cut into {world_size} x {vpp} pieces"] = cut_rows(world_size, vpp)
    return {name: rows for name, rows in groups.items() if rows}

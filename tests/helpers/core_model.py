"""A small residual network of Megatron-Core's own layers, and the paths of core that the library relies on.

Each exercise runs one path on the processes of a pool and returns plain numbers. They are what the CPU adapter has to
make possible; `tests/contract` removes its rows one by one and expects an exercise to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_metro.config.schema import ParallelConfig
from megatron_metro.device import Device
from megatron_metro.parallel.communicator import StaticShapeCommunicator
from megatron_metro.parallel.groups import ParallelGroups, reinitialise

VOCAB, WIDTH, SEQUENCE, BATCH = 32, 16, 8, 2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the small network is spread and trained."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    sequence_parallel: bool = False
    precision: str = "fp32"  # fp32, fp64, bf16 or fp16
    distributed_optimizer: bool = False
    overlap: bool = False
    dropout: float = 0.0
    recompute: bool = False
    num_layers: int = 4
    num_microbatches: int = 4
    num_steps: int = 3

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.precision
        ]

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vpp,
        )


def make_config(setting: Setting) -> TransformerConfig:
    return TransformerConfig(
        num_layers=setting.num_layers,
        hidden_size=WIDTH,
        num_attention_heads=2,
        tensor_model_parallel_size=setting.tp,
        sequence_parallel=setting.sequence_parallel,
        pipeline_model_parallel_size=setting.pp,
        virtual_pipeline_model_parallel_size=setting.vpp if setting.vpp > 1 else None,
        params_dtype=setting.dtype,
        pipeline_dtype=setting.dtype,
        bf16=setting.precision == "bf16",
        fp16=setting.precision == "fp16",
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=setting.vpp > 1,
        batch_p2p_comm=setting.vpp == 1,
        deallocate_pipeline_outputs=True,
        add_bias_linear=False,
    )


def _init_weight(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.2)


class Layer(nn.Module):
    """hidden + row_parallel(dropout(relu(column_parallel(hidden))))"""

    def __init__(self, config: TransformerConfig, setting: Setting) -> None:
        super().__init__()
        options = {"config": config, "init_method": _init_weight, "bias": False}
        self.up = ColumnParallelLinear(WIDTH, 4 * WIDTH, gather_output=False, skip_bias_add=True, **options)
        self.down = RowParallelLinear(4 * WIDTH, WIDTH, input_is_parallel=True, skip_bias_add=True, **options)
        self.setting = setting

    def forward(self, hidden: Tensor) -> Tensor:
        if self.setting.recompute:
            return tensor_parallel.checkpoint(self._compute, False, hidden)
        return self._compute(hidden)

    def _compute(self, hidden: Tensor) -> Tensor:
        inner = self.up(hidden)[0].relu()
        with tensor_parallel.get_cuda_rng_tracker().fork():  # sharded activations: each rank its own mask
            inner = nn.functional.dropout(inner, self.setting.dropout, self.training)
        return hidden + self.down(inner)[0]


class Chunk(MegatronModule):
    """One pipeline chunk: an embedding at the front of the chain, and its share of the layers."""

    def __init__(self, config: TransformerConfig, setting: Setting, piece: int) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        num_pieces = setting.pp * setting.vpp
        self.embedding = (
            VocabParallelEmbedding(VOCAB, WIDTH, init_method=_init_weight, config=config) if piece == 0 else None
        )
        self.layers = nn.ModuleList(Layer(config, setting) for _ in range(setting.num_layers // num_pieces))
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.received = tensors[0]

    def forward(self, ids: Tensor) -> Tensor:
        if self.embedding is not None:
            hidden = self.embedding(ids).transpose(0, 1).contiguous()
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        else:
            assert self.received is not None
            hidden = self.received
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def sharded_state_dict(self, prefix: str = "", offsets: tuple[Any, ...] = (), metadata: Any = None) -> Any:
        state = {}
        for name, module in self.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
                state.update(module.sharded_state_dict(f"{prefix}{name}.", offsets, metadata))
        return state


def make_batch(step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)


class Trainer:
    """Core's DDP, optimizer and schedule around the small network, as the library puts them together."""

    def __init__(self, setting: Setting) -> None:
        # Not `activate`, which would put back a row of the adapter that a contract test has taken out.
        device = Device(kind="cpu", backend="gloo", torch_device=torch.device("cpu"))
        self.setting = setting
        self.groups: ParallelGroups = reinitialise(setting.parallel)
        device.seed_all(1234, tp_rank=self.groups.tp_rank, pp_rank=self.groups.pp_rank)
        self.config = make_config(setting)
        self.chunks = [self._wrap(chunk) for chunk in range(setting.vpp)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                clip_grad=1.0,
                weight_decay=0.01,
                bf16=self.config.bf16,
                fp16=self.config.fp16,
                params_dtype=setting.dtype,
                initial_loss_scale=2.0**10,
                use_distributed_optimizer=setting.distributed_optimizer,
                overlap_param_gather=setting.overlap and setting.distributed_optimizer,
            ),
            self.chunks,
            config_overrides={},
            use_gloo_process_groups=False,
            pg_collection=self.groups.collection,
        )
        self.communicator = StaticShapeCommunicator(self.groups.pp_group, self.config)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.no_sync_func = [chunk.no_sync for chunk in self.chunks] if setting.overlap else None
        if setting.vpp == 1 and setting.overlap:
            self.config.no_sync_func = self.chunks[0].no_sync

    def _wrap(self, chunk: int) -> DistributedDataParallel:
        setting = self.setting
        module: nn.Module = Chunk(self.config, setting, chunk * setting.pp + self.groups.pp_rank)
        if self.config.bf16 or self.config.fp16:
            module = Float16Module(self.config, module)
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=setting.precision != "fp64",
            overlap_grad_reduce=setting.overlap,
            overlap_param_gather=setting.overlap and setting.distributed_optimizer,
            use_distributed_optimizer=setting.distributed_optimizer,
            bucket_size=500,
        )
        return DistributedDataParallel(
            self.config, options, module, disable_bucketing=chunk > 0, pg_collection=self.groups.collection
        )

    def step(self, step: int) -> tuple[float, float]:
        """Summed loss (last stage) and gradient norm of one update."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        local = self.setting.num_microbatches // self.groups.dp_size
        first = local * self.groups.dp_rank
        rows = SEQUENCE // (self.setting.tp if self.setting.sequence_parallel else 1)
        with self.communicator.step(local, lambda _piece: (rows, BATCH, WIDTH), forward_only=False):
            losses = get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=[iter([make_batch(step, first + i) for i in range(local)]) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=local,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
                p2p_communicator=self.communicator,
                pg_collection=self.groups.collection,
            )
        _, norm, _ = self.optimizer.step()
        return sum(losses), float(norm)

    def _forward(self, data: Any, chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple[Any, ...]]]:
        output = chunk(next(data))

        def loss(last: Tensor) -> tuple[Tensor, Tensor, float]:
            if self.config.sequence_parallel:
                last = tensor_parallel.gather_from_sequence_parallel_region(last, tensor_parallel_output_grad=False)
            total = (last.to(torch.promote_types(last.dtype, torch.float32)) - 0.5).square().mean()
            return total, torch.tensor(1, dtype=torch.int), total.item()

        return output, loss

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        metadata = {"dp_cp_group": self.groups.dp_group, "distrib_optim_sharding_type": "dp_reshardable"}
        model: dict[str, Any] = {}
        for chunk in self.chunks:
            inner = chunk.module.module if isinstance(chunk.module, Float16Module) else chunk.module
            model.update(inner.sharded_state_dict(metadata=metadata))
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def gather_parameters(self) -> None:
        """With an overlapped gather the weights are stale from a step until the next forward pass."""
        if self.setting.distributed_optimizer and self.setting.overlap:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def load(self, folder: str) -> None:
        loaded = dist_checkpointing.load(self.sharded_state(is_loading=True), folder)
        self.optimizer.load_state_dict(loaded["optimizer"])
        for optimizer in self.optimizer.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                # Core gives all parameters one and the same step tensor, which torch's Adam then counts up for each.
                state["step"] = state["step"].clone()
        for chunk in self.chunks:
            inner = chunk.module.module if isinstance(chunk.module, Float16Module) else chunk.module
            inner.load_state_dict(loaded["model"], strict=False)


def train(setting: Setting) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step on this rank."""
    trainer = Trainer(setting)
    return [trainer.step(step) for step in range(setting.num_steps)]


def save_and_load(setting: Setting, folder: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Steps after saving, and the same steps by a new trainer after loading."""
    trainer = Trainer(setting)
    trainer.step(0)
    if trainer.groups.rank == 0:
        Path(folder).mkdir(exist_ok=True)
    torch.distributed.barrier()
    trainer.gather_parameters()
    dist_checkpointing.save(trainer.sharded_state(), folder)
    first = [trainer.step(step) for step in (1, 2)]
    trainer = Trainer(setting)
    trainer.step(7)  # core cannot describe the state of torch's Adam before its first step
    trainer.gather_parameters()
    trainer.load(folder)
    return first, [trainer.step(step) for step in (1, 2)]

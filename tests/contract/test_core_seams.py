"""Signature and behaviour of every private seam of Megatron-Core that the library uses.

A new version of core that changes one of them fails here, with the seam's name, before anything trains on garbage.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.distributed import WorkerPool

megatron = pytest.importorskip("megatron.core")


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_core_is_the_pinned_version() -> None:
    assert megatron.__version__.startswith("0.16.1")


class TestCommunicator:
    """`parallel/communicator.py` overrides two methods of core's P2PCommunicator."""

    def test_signatures(self) -> None:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        assert parameters_of(P2PCommunicator.__init__) == ["self", "pp_group", "config"]
        assert parameters_of(P2PCommunicator._communicate_shapes) == [
            "self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next",
        ]  # fmt: skip
        assert parameters_of(P2PCommunicator._communicate) == [
            "self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next", "tensor_shape", "wait_on_reqs",
        ]  # fmt: skip

    @pytest.mark.parametrize("is_variable", [True, False])
    def test_shapes_are_asked_for_once_per_call_with_variable_lengths(self, is_variable: bool, groups: Any) -> None:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        calls = []

        class Recorder(P2PCommunicator):
            def _communicate_shapes(self, *arguments: Any) -> tuple[list[int], list[int]]:
                calls.append(arguments)
                return [0, 0, 0], [0, 0, 0]

        config = SimpleNamespace(
            variable_seq_lengths=is_variable, mtp_standalone=False, use_ring_exchange_p2p=False, batch_p2p_comm=False,
            batch_p2p_sync=False, pipeline_dtype=torch.float32, virtual_pipeline_model_parallel_size=None,
        )  # fmt: skip
        nothing = {"tensor_send_next": None, "tensor_send_prev": None, "recv_prev": False, "recv_next": False}
        Recorder(groups.pp_group, config)._communicate(**nothing, tensor_shape=None)
        assert calls == ([(None, None, False, False)] if is_variable else [])

    def test_schedule_table(self) -> None:
        from megatron.core.pipeline_parallel.schedules import get_schedule_table

        assert parameters_of(get_schedule_table) == [
            "num_microbatches", "num_model_chunks", "microbatch_group_size_per_vp_stage",
        ]  # fmt: skip
        microbatches, chunks = zip(*get_schedule_table(5, 2, 3))
        assert microbatches == (0, 1, 2, 0, 1, 2, 3, 4, 3, 4)
        assert chunks == (0, 0, 0, 1, 1, 1, 0, 0, 1, 1)

    def test_schedules_take_a_communicator_and_groups(self) -> None:
        from megatron.core.pipeline_parallel import schedules

        for name in ("with_interleaving", "without_interleaving"):
            names = parameters_of(getattr(schedules, f"forward_backward_pipelining_{name}"))
            assert {"p2p_communicator", "pg_collection", "forward_only"} <= set(names)

    @pytest.mark.parametrize("is_ours", [True, False])
    def test_overlapped_sends_survive_deallocation_only_in_ours(
        self, is_ours: bool, pool: Callable[[int], WorkerPool]
    ) -> None:
        """The trap our communicator exists for; core's own sends garbage over gloo."""
        _, received = pool(2).run(send_and_deallocate, is_ours)
        assert (received == [1.0]) == is_ours


def send_and_deallocate(is_ours: bool) -> list[float]:
    """Distinct values that rank 1 receives of ones that rank 0 sent and freed while the send was pending."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor
    from torch.distributed import barrier

    from megatron_metro.config.schema import ParallelConfig
    from megatron_metro.parallel.communicator import StaticShapeCommunicator
    from megatron_metro.parallel.groups import reinitialise

    groups = reinitialise(ParallelConfig(pipeline_model_parallel_size=2))
    shape = (1024, 4, 256)
    config = SimpleNamespace(
        variable_seq_lengths=is_ours, mtp_standalone=False, use_ring_exchange_p2p=False, batch_p2p_comm=False,
        batch_p2p_sync=False, pipeline_dtype=torch.float32, virtual_pipeline_model_parallel_size=None, timers=None,
        overlap_p2p_comm=True, microbatch_group_size_per_vp_stage=2,
    )  # fmt: skip
    communicator = (StaticShapeCommunicator if is_ours else P2PCommunicator)(groups.pp_group, config)

    def exchange() -> list[float]:
        options: dict[str, Any] = {"tensor_shape": shape, "overlap_p2p_comm": True}
        if groups.pp_rank == 0:
            output = torch.ones(shape)
            _, handles = communicator.send_forward_recv_forward(output, recv_prev=False, **options)
            deallocate_output_tensor(output, True)
            overwritten = [torch.full(shape, 7.0) for _ in range(8)]  # takes the freed memory
            barrier()
            handles["send_next"].wait()
            return [float(overwritten[0][0, 0, 0])]
        barrier()
        received, handles = communicator.send_forward_recv_forward(None, recv_prev=True, **options)
        handles["recv_prev"].wait()
        return sorted(set(received.flatten().tolist()))

    if not is_ours:
        return exchange()
    with communicator.step(1, lambda _piece: shape, forward_only=True):
        return exchange()


class TestDistributedDataParallel:
    """`parallel/shared_weights.py` marks parameters for core's DDP and optimizer."""

    def test_shared_embedding_gets_its_own_bucket(self, groups: Any) -> None:
        assert bucket_names(wrap(Three(), groups)) == [{"first", "middle", "last", "bias"}]
        marked = bucket_names(wrap(Three(shared="middle"), groups))
        assert {"middle"} in marked
        assert set().union(*marked) == {"first", "middle", "last", "bias"}

    def test_finalize_divides_by_the_number_of_tokens(self, groups: Any) -> None:
        from megatron.core.distributed import finalize_model_grads

        assert parameters_of(finalize_model_grads) == ["model", "num_tokens", "pg_collection", "force_all_reduce"]
        ddp = wrap(Three(), groups)
        for parameter in ddp.module.parameters():
            parameter.main_grad.fill_(6.0)
        num_tokens = torch.tensor(3, dtype=torch.int)
        finalize_model_grads([ddp], num_tokens, pg_collection=groups.collection)
        assert all(bool((parameter.main_grad == 2.0).all()) for parameter in ddp.module.parameters())

    def test_no_tokens_leave_gradients_alone(self, groups: Any) -> None:
        from megatron.core.distributed import finalize_model_grads

        ddp = wrap(Three(), groups)
        ddp.module.first.main_grad.fill_(6.0)
        finalize_model_grads([ddp], torch.tensor(0, dtype=torch.int), pg_collection=groups.collection)
        assert bool((ddp.module.first.main_grad == 6.0).all())

    def test_sequence_parallel_marks_are_summed_over_tensor_ranks(self, pool: Callable[[int], WorkerPool]) -> None:
        assert pool(2).run(finalize_marked_gradients) == [(3.0, 1.0), (3.0, 2.0)]


class Three(nn.Module):
    """Three weights, one of which may be marked as shared."""

    def __init__(self, shared: str | None = None) -> None:
        super().__init__()
        for name in ("first", "middle", "last"):
            self.register_parameter(name, nn.Parameter(torch.ones(64, 2)))
        self.bias = nn.Parameter(torch.ones(2))
        if shared is not None:
            getattr(self, shared).shared_embedding = True

    def set_input_tensor(self, _tensors: Any) -> None: ...


def bucket_names(ddp: Any) -> list[set[str]]:
    names = {parameter: name for name, parameter in ddp.module.named_parameters()}
    return [{names[parameter] for parameter in bucket.params} for bucket in ddp.buffers[0].buckets]


def wrap(module: nn.Module, groups: Any, **options: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"tensor_model_parallel_size": groups.tp_size, "sequence_parallel": groups.tp_size > 1}
    config = TransformerConfig(
        num_layers=1, hidden_size=2, num_attention_heads=2, calculate_per_token_loss=True, **sizes
    )
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True, **options)
    return DistributedDataParallel(config, ddp_config, module, pg_collection=groups.collection)


def finalize_marked_gradients() -> tuple[float, float]:
    """A marked and an unmarked weight whose gradients are 1 on rank 0 and 2 on rank 1."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_metro.config.schema import ParallelConfig
    from megatron_metro.parallel.groups import reinitialise

    groups = reinitialise(ParallelConfig(tensor_model_parallel_size=2))
    module = Three()
    module.first.sequence_parallel = True
    ddp = wrap(module, groups)
    for weight in (module.first, module.last):
        weight.main_grad.fill_(groups.tp_rank + 1.0)
    finalize_model_grads([ddp], None, pg_collection=groups.collection)
    return module.first.main_grad[0, 0].item(), module.last.main_grad[0, 0].item()


class TestOptimizer:
    """`training/optimizer.py` wants weight decay everywhere and shared weights counted once."""

    @staticmethod
    def build(module: nn.Module, groups: Any, overrides: Any) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, use_distributed_optimizer=True)
        return get_megatron_optimizer(
            config,
            [wrap(module, groups)],
            config_overrides=overrides,
            use_gloo_process_groups=False,
            pg_collection=groups.collection,
        )

    @pytest.mark.parametrize(("overrides", "decays_biases"), [({}, True), (None, False)])
    def test_empty_overrides_decay_biases_too(self, overrides: Any, decays_biases: bool, groups: Any) -> None:
        groups_of_parameters = self.build(Three(), groups, overrides).param_groups
        assert all(group["wd_mult"] == 1.0 for group in groups_of_parameters) == decays_biases

    def test_shared_copies_are_left_out_of_the_norm(self, groups: Any) -> None:
        module = Three()
        module.last.shared = True
        optimizer = self.build(module, groups, {})
        for parameter in module.parameters():
            parameter.main_grad.fill_(1.0)
        _, norm, _ = optimizer.step()
        assert norm == pytest.approx((2 * 64 * 2 + 2) ** 0.5)


class TestParallelState:
    """`parallel/groups.py` keeps core's embedding synchronisation off and closes core's groups itself."""

    def test_signatures(self) -> None:
        from megatron.core import parallel_state

        assert {
            "get_embedding_ranks", "get_position_embedding_ranks", "create_gloo_process_groups",
            "distributed_timeout_minutes", "virtual_pipeline_model_parallel_size",
        } <= set(parameters_of(parallel_state.initialize_model_parallel))  # fmt: skip

    def test_created_groups_are_listed(self, groups: Any) -> None:
        from megatron.core import parallel_state

        listed = parallel_state._global_process_group_list
        assert listed[0] is None
        assert groups.tp_group in listed and groups.pp_group in listed and groups.dp_group in listed

    @pytest.mark.usefixtures("device")
    def test_seeds_of_the_tracker(self) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

        assert {"tp_rank", "ep_rank", "etp_rank"} <= set(parameters_of(model_parallel_cuda_manual_seed))
        model_parallel_cuda_manual_seed(7, tp_rank=3, ep_rank=0, etp_rank=3)
        assert get_cuda_rng_tracker().seeds_ == {7, 7 + 2718 + 3, 7 + 1024 + 3}


class TestSchedules:
    """What the payload relies on: freed outputs, and a single tensor that carries the gradient."""

    def test_views_are_refused(self) -> None:
        from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

        with pytest.raises(AssertionError, match="view"):
            deallocate_output_tensor(torch.ones(4).view(2, 2), True)

    def test_freed_outputs_still_carry_gradients(self) -> None:
        from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

        weight = torch.ones(3, requires_grad=True)
        output = weight * 2.0
        deallocate_output_tensor(output, True)
        assert output.numel() == 1
        custom_backward(output, torch.tensor([1.0, 2.0, 3.0]))
        assert weight.grad is not None and weight.grad.tolist() == [2.0, 4.0, 6.0]


class TestSaving:
    """`training/saving.py` plans with core and torch, writes by itself, and has torch describe what was written."""

    def test_signatures(self) -> None:
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
        from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
        from megatron.core.dist_checkpointing.strategies import torch as strategy
        from torch.distributed.checkpoint import FileSystemWriter
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        assert parameters_of(save_preprocess)[:2] == ["sharded_state_dict", "validate_access_integrity"]
        assert parameters_of(save_config) == ["config", "checkpoint_dir"]
        assert parameters_of(CheckpointingConfig)[:2] == ["sharded_backend", "sharded_backend_version"]
        assert parameters_of(strategy.mcore_to_pyt_state_dict)[:2] == ["state_dict", "is_loading"]
        keys = parameters_of(strategy._replace_state_dict_keys_with_sharded_keys)
        assert keys == ["sharded_state_dict", "keep_only_main_replica"]
        assert parameters_of(FileSystemWriter.write_data) == ["self", "plan", "planner"]
        assert parameters_of(FileSystemWriter.finish) == ["self", "metadata", "results"]
        assert parameters_of(_StorageInfo)[:3] == ["relative_path", "offset", "length"]

    def test_torch_asks_for_data_once_and_then_for_the_description(self, groups: Any, tmp_path: Path) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, save
        from torch.futures import Future

        calls = []

        class Recorder(FileSystemWriter):
            def write_data(self, plan: Any, planner: Any) -> Any:
                calls.append([plan.storage_data.prefix, *(item.index.fqn for item in plan.items)])
                nothing: Future[list[Any]] = Future()
                nothing.set_result([])
                return nothing

            def finish(self, metadata: Any, results: Any) -> None:
                calls.append([*metadata.state_dict_metadata, *results])

        save({"a": torch.zeros(2)}, storage_writer=Recorder(tmp_path / "step"))
        assert calls == [["__0_", "a"], ["a", []]]
        assert list((tmp_path / "step").iterdir()) == []

    def test_core_finds_a_part_that_nobody_writes(self, groups: Any) -> None:
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.dist_checkpointing.core import CheckpointingException
        from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

        half = ShardedTensor.from_rank_offsets("a", torch.zeros(2), (0, 0, 2))
        with pytest.raises(CheckpointingException, match="Invalid access pattern"):
            save_preprocess({"a": half})

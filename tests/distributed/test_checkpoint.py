"""Checkpoints: any layout goes on where any other stopped, the same layout to the bit, and nothing lies."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from megatron_metro.checkpoint.folder import TRACKER, read_document
from megatron_metro.checkpoint.manifest import write_manifest
from megatron_metro.config.errors import CheckpointError, StorageError
from megatron_metro.config.schema import CheckpointConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_metro.parallel.groups import ParallelGroups, reinitialise
from megatron_metro.training.loading import load_checkpoint
from megatron_metro.training.model_space import get_num_updates
from megatron_metro.training.optimizer import build_optimizer, optimizer_step, set_learning_rate, wrap
from megatron_metro.training.saving import save_checkpoint
from megatron_metro.training.state import TrainState
from tests.distributed.test_optimizer import LR, OPTIMIZER, expected_weights
from tests.distributed.tiny_model import PADDED_VOCAB_SIZE, SHAPES, SHARED, build_pieces, local_part, named_parameters
from tests.distributed.tiny_model import set_gradients as set_full_gradients


class Run:
    """A model with its optimizer in one layout, updated by the gradients of numbered steps."""

    def __init__(self, parallel: ParallelConfig, optimizer: OptimizerConfig, checkpoint: CheckpointConfig) -> None:
        self.groups: ParallelGroups = reinitialise(parallel)
        self.config = RunConfig(parallel=parallel, optimizer=optimizer, checkpoint=checkpoint)
        self.dtype = torch.bfloat16 if optimizer.bf16 else torch.float16 if optimizer.fp16 else torch.float32
        pieces = build_pieces(self.groups, parallel.num_virtual_stages_per_pipeline_rank, self.dtype)
        self.chunks = wrap(self.config, pieces, self.groups)
        self.optimizer = build_optimizer(self.config, self.chunks, self.groups)
        set_learning_rate(self.optimizer, LR)
        self.state = TrainState()

    def load(self) -> TrainState | None:
        """From --load, over weights that loading must replace (padded vocabulary rows stay zero)."""
        for name, parameter in named_parameters(self.chunks):
            if name != SHARED:
                parameter.data.fill_(7.0)
        loaded = load_checkpoint(self.config, self.chunks, self.optimizer, self.groups)
        self.state = loaded or TrainState()
        return loaded

    def advance(self, to_step: int) -> None:
        while self.state.iteration < to_step:
            step = self.state.iteration + 1
            set_full_gradients(self.chunks, step, self.groups, scale=float(self.optimizer.get_loss_scale()))
            assert optimizer_step(self.optimizer).updated
            self.state = TrainState(iteration=step, consumed_samples=16 * step)

    def save(self) -> Path:
        return save_checkpoint(self.config, self.state, self.chunks, self.optimizer, self.groups)

    def check(self, start_dtype: torch.dtype) -> None:
        """Weights are those of an uninterrupted run that started in `start_dtype`."""
        expected = expected_weights(self.state.iteration, start_dtype=start_dtype)
        tolerance = 1e-6 if self.dtype == torch.float32 else 4e-3  # half a unit in the last place of BF16
        for name, parameter in named_parameters(self.chunks):
            wanted = local_part(expected[name], parameter, name, self.groups)
            torch.testing.assert_close(parameter.detach().double(), wanted, rtol=tolerance, atol=tolerance)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that decides how this rank goes on."""
        tensors = {f"weight {i}": p.detach() for i, (_, p) in enumerate(named_parameters(self.chunks))}
        parameters = self.optimizer.get_parameters()
        tensors |= {f"main {i}": parameter.detach() for i, parameter in enumerate(parameters)}
        for i, parameter in enumerate(parameters):
            tensors |= {f"{name} {i}": value for name, value in self.optimizer.optimizer.state[parameter].items()}
        tensors["loss scale"] = self.optimizer.get_loss_scale()
        return {name: tensor.clone() for name, tensor in tensors.items()}


def layout(tp: int, pp: int = 1, vpp: int = 1, *, distributed: bool = False) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        use_distributed_optimizer=distributed,
    )


def start_and_save(parallel: ParallelConfig, optimizer: OptimizerConfig, folder: str) -> None:
    run = Run(parallel, optimizer, CheckpointConfig(save=folder))
    run.advance(2)
    run.save()


def load_and_go_on(
    parallel: ParallelConfig, optimizer: OptimizerConfig, folder: str, start_dtype: torch.dtype = torch.float32
) -> None:
    run = Run(parallel, optimizer, CheckpointConfig(load=folder))
    assert run.load() == TrainState(iteration=2, consumed_samples=32)
    assert get_num_updates(run.optimizer) == 2
    run.check(start_dtype)
    run.advance(3)
    run.check(start_dtype)


FP32, BF16 = OPTIMIZER, replace(OPTIMIZER, bf16=True)
DP2, DP2_DISTRIBUTED, TP2 = layout(1), layout(1, distributed=True), layout(2)
PP2, PP2_VPP2 = layout(1, 2), layout(1, 2, 2)
PAIRS = [
    pytest.param(DP2, FP32, DP2_DISTRIBUTED, FP32, id="dp2-to-distributed"),
    pytest.param(DP2_DISTRIBUTED, FP32, TP2, FP32, id="distributed-to-tp2"),
    pytest.param(TP2, FP32, PP2_VPP2, FP32, id="tp2-to-pp2-vpp2"),
    pytest.param(PP2_VPP2, FP32, PP2, FP32, id="pp2-vpp2-to-pp2"),
    pytest.param(PP2, FP32, DP2_DISTRIBUTED, FP32, id="pp2-to-distributed"),
    pytest.param(DP2_DISTRIBUTED, BF16, TP2, BF16, id="bf16-distributed-to-tp2"),
    pytest.param(TP2, BF16, DP2_DISTRIBUTED, BF16, id="bf16-tp2-to-distributed"),
    pytest.param(TP2, BF16, DP2, FP32, id="bf16-to-fp32"),
    pytest.param(PP2, FP32, DP2_DISTRIBUTED, BF16, id="fp32-to-bf16"),
]


@pytest.mark.parametrize(("saving", "saved_in", "loading", "loaded_in"), PAIRS)
def test_any_layout_goes_on_where_any_other_stopped(pool, tmp_path, saving, saved_in, loading, loaded_in):
    pool(2).run(start_and_save, saving, saved_in, str(tmp_path))
    start_dtype = torch.bfloat16 if saved_in.bf16 else torch.float32
    pool(2).run(load_and_go_on, loading, loaded_in, str(tmp_path), start_dtype)


def test_one_process_and_two_read_each_others_checkpoints(pool, groups, tmp_path):
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    pool(2).run(start_and_save, DP2_DISTRIBUTED, FP32, two)
    load_and_go_on(ParallelConfig(), FP32, two)
    start_and_save(ParallelConfig(), FP32, one)
    pool(2).run(load_and_go_on, TP2, FP32, one)


def resume_exactly(parallel: ParallelConfig, optimizer: OptimizerConfig, folder: str) -> None:
    run = Run(parallel, optimizer, CheckpointConfig(save=folder))
    run.advance(2)
    torch.rand(5)
    run.save()
    draws = torch.rand(10)
    run.advance(4)
    uninterrupted = run.tensors()

    torch.manual_seed(99)
    resumed = Run(parallel, optimizer, CheckpointConfig(load=folder))
    resumed.load()
    assert torch.equal(torch.rand(10), draws)
    resumed.advance(4)
    for name, tensor in resumed.tensors().items():
        assert torch.equal(tensor, uninterrupted[name]), name


@pytest.mark.parametrize("parallel", [DP2, DP2_DISTRIBUTED, TP2, PP2_VPP2])
@pytest.mark.parametrize("half", ["", "bf16", "fp16"])
def test_the_same_layout_resumes_to_the_bit(pool, tmp_path, parallel, half):
    optimizer = replace(OPTIMIZER, loss_scale_window=2, **({half: True} if half else {}))
    pool(2).run(resume_exactly, parallel, optimizer, str(tmp_path))


def save_without_moments(folder: str) -> None:
    run = Run(DP2_DISTRIBUTED, BF16, CheckpointConfig(save=folder, no_save_optim=True))
    run.advance(2)
    run.save()


def finetune(folder: str) -> None:
    with pytest.raises(CheckpointError, match="add --no-load-optim or --finetune"):
        Run(TP2, FP32, CheckpointConfig(load=folder)).load()
    run = Run(TP2, FP32, CheckpointConfig(load=folder, finetune=True))
    assert run.load() == TrainState()
    assert get_num_updates(run.optimizer) == 0
    run.state = TrainState(iteration=2)
    run.check(torch.bfloat16)
    run = Run(TP2, FP32, CheckpointConfig(load=folder, no_load_optim=True))
    assert run.load().iteration == 2
    assert get_num_updates(run.optimizer) == 0


def test_weights_alone(pool, tmp_path):
    pool(2).run(save_without_moments, str(tmp_path))
    pool(2).run(finetune, str(tmp_path))


@pytest.fixture
def saved(groups, tmp_path) -> Path:
    """A folder in which one process saved step 2."""
    start_and_save(ParallelConfig(), FP32, str(tmp_path / "run"))
    return tmp_path / "run"


def load(folder: Path, **options) -> TrainState | None:
    return Run(ParallelConfig(), FP32, CheckpointConfig(load=str(folder), **options)).load()


@pytest.mark.parametrize("is_same", [True, False])
def test_random_states_come_back_at_their_own_layout_only(saved, monkeypatch, caplog, is_same):
    if not is_same:
        monkeypatch.setattr("megatron_metro.training.loading.describe_layout", lambda *_: {"tensor": 2})
    run = Run(ParallelConfig(), FP32, CheckpointConfig(load=str(saved)))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    run.load()
    assert torch.equal(torch.get_rng_state(), before) is not is_same
    said = [record.getMessage() for record in caplog.records if record.name == "megatron_metro.training.loading"]
    assert ["dropout goes on from --seed" in text for text in said] == [True] * (not is_same)


def test_files_are_megatrons_and_hold_no_pickled_object(saved):
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "2"
    step = saved / "iter_0000002"
    assert {".metadata", "common.pt", "metadata.json", "manifest.json"} < {path.name for path in step.iterdir()}
    assert torch.load(step / "common.pt", weights_only=True) == {}
    entries = FileSystemReader(step).read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
    assert entries[SHARED].size[0] < PADDED_VOCAB_SIZE
    assert f"optimizer.state.exp_avg.{SHARED}" in entries
    document = json.loads((step / "manifest.json").read_text())
    assert document["train"]["consumed_samples"] == 32
    assert document["config"]["optimizer"]["lr"] == OPTIMIZER.lr


def test_an_existing_step_is_never_written_again(saved):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    run = Run(ParallelConfig(), FP32, CheckpointConfig(save=str(saved)))
    run.advance(2)
    with pytest.raises(CheckpointError, match="iter_0000002: exists already"):
        run.save()
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_what_a_killed_save_left_is_cleared(saved):
    leftovers = [saved / "iter_0000003.abc.partial", saved / "iter_0000001.deleted"]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "__0_0.distcp").write_bytes(b"half")
    run = Run(ParallelConfig(), FP32, CheckpointConfig(save=str(saved), load=str(saved)))
    run.load()
    run.advance(3)
    run.save()
    assert not any(leftover.exists() for leftover in leftovers)
    assert load(saved).iteration == 3
    assert load(saved, ckpt_step=2).iteration == 2


def test_a_failing_file_system_leaves_earlier_steps_alone(saved, monkeypatch):
    run = Run(ParallelConfig(), FP32, CheckpointConfig(save=str(saved), load=str(saved)))
    run.load()
    run.advance(3)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=r"No space left.* MB needed, .* MB free\); earlier steps are intact"):
        run.save()
    monkeypatch.undo()
    assert sorted(path.name for path in saved.iterdir()) == ["iter_0000002", TRACKER]
    assert load(saved).iteration == 2


def test_a_damaged_step_is_refused_in_one_line(saved):
    step = saved / "iter_0000002"
    shard = step / "__0_0.distcp"
    whole = shard.read_bytes()
    for content, words in ((whole[:-1], "manifest.json says"), (b"x" + whole[1:], "is damaged, its SHA-256 is")):
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"__0_0.distcp: .*{words} .*; choose another step") as refusal:
            load(saved)
        assert "\n" not in str(refusal.value)
    shard.write_bytes(whole)
    (step / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000002/.metadata: is missing"):
        load(saved)
    (step / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json: is damaged"):
        load(saved)


def vouch_again(step: Path) -> None:
    """As someone who can write the folder could."""
    document = read_document(step)
    (step / "manifest.json").unlink()
    write_manifest(step, {key: value for key, value in document.items() if key not in ("files", "sha256")})


def test_what_a_manifest_vouches_for_is_still_read_with_care(saved):
    step = saved / "iter_0000002"
    shard = step / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    vouch_again(step)
    with pytest.raises(CheckpointError, match=r"iter_0000002/.*__0_0.distcp.* choose another step"):
        load(saved)
    shard.write_bytes(whole)
    (step / ".metadata").unlink()
    vouch_again(step)
    with pytest.raises(CheckpointError, match=r"iter_0000002/\.metadata"):
        load(saved)


def test_another_models_checkpoint_is_refused(saved, monkeypatch):
    monkeypatch.setattr("tests.distributed.tiny_model.NUM_LAYERS", 2)
    with pytest.raises(CheckpointError, match=r"holds layers\.2\..* which this model has not"):
        load(saved)
    assert load(saved, finetune=True) == TrainState()
    monkeypatch.undo()
    monkeypatch.setattr("tests.distributed.tiny_model.VOCAB_SIZE", 8)
    monkeypatch.setitem(SHAPES, SHARED, (8, 6))
    with pytest.raises(CheckpointError, match=r"holds word_embeddings.weight of shape \(9, 6\), this run has \(8, 6\)"):
        Run(ParallelConfig(), FP32, CheckpointConfig(load=str(saved), finetune=True)).load()


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        pytest.param(layout(2, distributed=True), layout(4), id="tp2-dp2-to-tp4"),
        pytest.param(layout(4), layout(1, 2, 2, distributed=True), id="tp4-to-pp2-vpp2-dp2"),
        pytest.param(layout(1, 4), layout(1, distributed=True), id="pp4-to-dp4"),
    ],
)
def test_four_processes(pool, tmp_path, saving, loading):
    pool(4).run(start_and_save, saving, FP32, str(tmp_path))
    pool(4).run(load_and_go_on, loading, FP32, str(tmp_path))

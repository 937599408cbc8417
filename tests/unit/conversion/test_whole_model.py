"""A whole model from a saved step: the weights of any layout, in a process that was told nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_metro.config.errors import CheckpointError, MetroError
from megatron_metro.config.schema import ParallelConfig, RunConfig, TokenizerConfig
from megatron_metro.conversion.whole_model import load_model
from megatron_metro.parallel.groups import ParallelGroups, reinitialise
from megatron_metro.parallel.stage_plan import plan_layout
from tests.helpers import stored_run
from tests.helpers.repository import ROOT
from tests.helpers.tiny import PAD_ID, SPACTOR, T5_V1_1, tiny_model

MODELS = {
    "metro": tiny_model(),
    "t5 v1.1": tiny_model(**T5_V1_1),
    "spactor": tiny_model(**SPACTOR),
    "electra": tiny_model(decoder_num_layers=0),
}
OBJECTIVES = {"t5 v1.1": "t5-span", "spactor": "spactor", "electra": "electra"}
LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "dp2": ParallelConfig(use_distributed_optimizer=True),
}


def make_run(model: str) -> RunConfig:
    run = replace(stored_run.RUN, model=MODELS[model])
    return replace(run, objective=replace(run.objective, objective=OBJECTIVES.get(model, "metro")))


def save_at(parallel: ParallelConfig, model: str, folder: str) -> None:
    groups = reinitialise(parallel)
    stored_run.save_run(Path(folder), groups, stored_run.at_layout(parallel, make_run(model)), noise=False)


def initial_weights(model: str, groups: ParallelGroups) -> dict[str, torch.Tensor]:
    """What no layout changes: the weights a model of one process starts with."""
    from megatron_metro.model.build import build_pieces

    run = make_run(model)
    [piece] = build_pieces(run, plan_layout(run), groups, torch.float32, PAD_ID)
    return dict(piece.named_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_any_layout_becomes_one_model(layout, model, pool, groups, tmp_path):
    pool(2).run(save_at, LAYOUTS[layout], model, str(tmp_path / "run"))
    loaded = load_model(tmp_path / "run", device="cpu")
    found, expected = dict(loaded.named_parameters()), initial_weights(model, groups)
    assert found.keys() == expected.keys() and not loaded.training
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_process_that_started_nothing(groups, tmp_path):
    stored = stored_run.save_run(tmp_path / "run", groups)
    script = (
        "import sys\nfrom megatron_metro.conversion.whole_model import load_model\n"
        "model = load_model(sys.argv[1], step=3, device='cpu')\n"
        "print(sum(float(weight.double().sum()) for weight in model.parameters()))\n"
    )
    command = [sys.executable, "-c", script, str(stored.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) == sum(float(weight.double().sum()) for weight in stored.weights().values())


def test_what_does_not_fit_is_refused(groups, tmp_path):
    stored = stored_run.save_run(tmp_path / "run", groups)
    with pytest.raises(CheckpointError, match=r"iter_0000004: does not exist"):
        load_model(stored.folder, step=4)
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "none")
    (stored.step / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        load_model(stored.folder)


def test_a_missing_tokenizer_is_named(groups, tmp_path):
    run = replace(
        stored_run.RUN, tokenizer=TokenizerConfig(tokenizer_model=str(tmp_path / "gone.model"), vocab_extra_ids=8)
    )
    stored = stored_run.save_run(tmp_path / "run", groups, run)
    with pytest.raises(MetroError, match=r"gone\.model"):
        load_model(stored.folder)

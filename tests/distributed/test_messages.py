"""Messages between stages: as many and as large as the stage table says, to the byte."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from megatron_metro.config.schema import DataConfig, ObjectiveConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_metro.parallel.stage_plan import StagePlan, plan_stages
from tests.helpers import tiny
from tests.helpers.distributed import WorkerPool
from tests.helpers.parity import GLOBAL_BATCH_SIZE, Case

Pool = Callable[[int], WorkerPool]

SPANS = ObjectiveConfig(objective="t5-span", mask_prob=0.3, mean_noise_span_length=2.0)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends in one step."""

    forward: Counter[int] = field(default_factory=Counter)  # number of messages by bytes
    backward: Counter[int] = field(default_factory=Counter)
    counted: tuple[int, int]  # the communicator's own sums
    place: tuple[int, int]  # pipeline rank and stages


def measure_traffic(case: Case) -> tuple[Traffic, Traffic]:
    """What megatron-core is told to send, in training and in validation."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from tests.helpers.mutations import replaced_attribute
    from tests.helpers.pipeline import build_engine, microbatches_of

    engine = build_engine(case)
    communicator, core_communicate = engine.communicator, P2PCommunicator._communicate
    assert communicator is not None
    sent: dict[str, Counter[int]] = {}

    def communicate(self: P2PCommunicator, **options: Any) -> Any:
        for name, sizes in sent.items():
            if (tensor := options[name]) is not None:
                sizes[tensor.numel() * tensor.element_size()] += 1
        return core_communicate(self, **options)

    def watch(step: Callable[..., Any], *arguments: Any) -> Traffic:
        sent.update(tensor_send_next=Counter(), tensor_send_prev=Counter())
        step(*arguments)
        return Traffic(
            forward=sent["tensor_send_next"],
            backward=sent["tensor_send_prev"],
            counted=(communicator.forward_bytes_sent, communicator.backward_bytes_sent),
            place=(engine.groups.pp_rank, engine.groups.pp_size),
        )

    microbatches = microbatches_of(engine, case)
    with replaced_attribute(P2PCommunicator, "_communicate", communicate):
        return watch(engine.accumulate_gradients, microbatches), watch(engine.evaluate, [microbatches])


def make_case(
    parallel: ParallelConfig,
    *,
    bf16: bool = False,
    micro_batch_size: int = 2,
    spans: bool = False,
    vocab_size: int = tiny.VOCAB_SIZE,
) -> Case:
    """A case whose run also tells the planner what the tiny batches are: 16 tokens, 8 slots or 8 written tokens."""
    model = tiny.tiny_model(vocab_size=vocab_size, generator_num_layers=0 if spans else 2)
    run: RunConfig = replace(
        tiny.tiny_run(model, parallel, SPANS if spans else ObjectiveConfig(), bf16=bf16),
        data=DataConfig(encoder_seq_length=tiny.LENGTH),
        training=TrainingConfig(micro_batch_size=micro_batch_size),
    )
    return Case(
        run=run,
        micro_batch_size=micro_batch_size,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        spans=spans,
        layout=run.parallel.pipeline_model_parallel_layout,
    )


def check_traffic(case: Case, results: list[tuple[Traffic, Traffic]]) -> None:
    """Every rank against the stage table that tools/plan.py prints."""
    parallel = case.run.parallel
    replicas = len(results) // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    count = GLOBAL_BATCH_SIZE // (case.micro_batch_size * replicas)
    plan: StagePlan = plan_stages(case.run, count)
    sizes = [piece.bytes_sent for piece in plan.pieces[:-1]]  # of each boundary, in the order of the chain
    for training, validation in results:
        rank, pp_size = training.place
        forward = Counter(dict.fromkeys(sizes, 0))
        backward = Counter(forward)
        for boundary, size in enumerate(sizes):
            forward[size] += count * (boundary % pp_size == rank)
            backward[size] += count * ((boundary + 1) % pp_size == rank)
        assert training.forward == +forward and training.backward == +backward
        assert validation.forward == +forward and not validation.backward
        forward_bytes, backward_bytes = (sum(s * n for s, n in sent.items()) for sent in (forward, backward))
        assert training.counted == (forward_bytes, backward_bytes)
        assert validation.counted == (forward_bytes, 0)


def pipeline(layout: str, pp: int, vpp: int = 1, tp: int = 1) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        pipeline_model_parallel_layout=layout,
    )


# Cuts in the middle of every network and at every seam: after the sampling unit, the RTD head and the embedding. Three
# stages are in the full tier, since they need processes of their own.
CASES = {
    "tp2sp-pp2-fp32": make_case(pipeline("GggMe|eRDddL", 2, tp=2)),
    "tp2sp-pp2x2-bf16": make_case(pipeline("Gg|gMeeR|D|ddL", 2, 2, tp=2), bf16=True),
    "pp4-fp32-three-digits": make_case(pipeline("Ggg|Mee|RDd|dL", 4), vocab_size=65_537, micro_batch_size=6),
    "pp4x2-bf16": make_case(pipeline("G|gg|M|e|eR|D|dd|L", 4, 2), bf16=True, micro_batch_size=3),
    "pp2x2-dp2-spans-fp32": make_case(pipeline("E|ee|Dd|dL", 2, 2), spans=True, micro_batch_size=1),
}


@pytest.mark.parametrize("name", CASES)
def test_messages_are_the_planned_ones(name: str, pool: Pool) -> None:
    check_traffic(CASES[name], pool(4).run(measure_traffic, CASES[name]))

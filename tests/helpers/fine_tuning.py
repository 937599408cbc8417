"""Fine-tuning in this process as the tools do it, and what its result writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_metro.checkpoint.start import read_saved_settings
from megatron_metro.config.cli import Tool, parse_run
from megatron_metro.config.presets import fine_tuning
from megatron_metro.device import Device
from megatron_metro.inference.options import WritingOptions
from megatron_metro.inference.serving import open_answerer, read_saved_run
from megatron_metro.parallel.groups import single_process
from megatron_metro.tokenizer import Tokenizer
from megatron_metro.training.loading import load_checkpoint
from megatron_metro.training.loop import pretrain
from tests.helpers.tasks import Pair

BATCH_SIZE = 32


def run_pretraining(device: Device, *flags: object) -> None:
    """`tools/pretrain.py` with these flags."""
    single_process(device).destroy()  # the run starts and ends its own groups
    pretrain(parse_run([str(flag) for flag in flags], 1), rank=0, world_size=1)


def run_fine_tuning(device: Device, *flags: object) -> None:
    """`tools/finetune.py` with these flags."""
    single_process(device).destroy()
    words, tool = [str(flag) for flag in flags], Tool(start=fine_tuning())
    pretrain(parse_run(words, 1, read_saved=read_saved_settings, tool=tool), rank=0, world_size=1)


def answer(folder: Path, sources: Sequence[str], max_new_tokens: int, device: Device) -> list[str]:
    """What `tools/generate.py --load folder` writes greedily after each source."""
    flags: dict[str, Any] = {
        **dict.fromkeys(("ckpt_step", "tokenizer_model", "decoder_start")),
        **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1),
        "load": str(folder),
        "precision": "fp32",
        "mode": "write",
        "max_new_tokens": max_new_tokens,
    }
    run, options = read_saved_run(flags), WritingOptions(max_new_tokens=max_new_tokens)
    answerer = open_answerer(run, single_process(device), device, flags, options, load_checkpoint)
    requests = answerer.reader.read([json.dumps({"source": source}) for source in sources], "sources")
    batches = [requests[start : start + BATCH_SIZE] for start in range(0, len(requests), BATCH_SIZE)]
    return [json.loads(line)["output"] for batch in batches for line in answerer.answer(batch)]


def count_matches(answers: Sequence[str], pairs: Sequence[Pair], tokenizer: Tokenizer) -> int:
    """Answers that are the target to the letter, as far as the tokenizer can spell it."""
    targets = [tokenizer.decode(tokenizer.encode(target)) for _, target in pairs]
    return sum(answer == target for answer, target in zip(answers, targets, strict=True))

"""The stages of a run: SPACTOR trains with its generator up to step tau and goes on with span corruption alone.

SPACTOR, section 3: replaced tokens help early and hurt late. The switch is a save and a load like any other, so a run
that passes it and one that is stopped and resumed there are the same run; the second stage is a plain T5, and what the
generator and the detector took (weights, gradients, optimizer state, FLOPs) is gone.
"""

from dataclasses import replace

from megatron_metro.config.batches import count_steps
from megatron_metro.config.objectives import find_switch
from megatron_metro.config.schema import RunConfig


def list_stages(run: RunConfig, start_iteration: int) -> list[RunConfig]:
    """What is left to train of a resolved run from `start_iteration` on, each stage a run up to its last step."""
    switch, train_iters = find_switch(run), count_steps(run.training)
    assert train_iters is not None, "checked by require_training_inputs"
    if switch is None or switch >= train_iters:
        return [run]
    second = replace(run, model=replace(run.model, generator_num_layers=0))
    if start_iteration >= switch:
        return [second]
    first = replace(run, training=replace(run.training, train_iters=switch, train_samples=None))
    checkpoint = run.checkpoint
    assert checkpoint.save is not None, "checked by validate: the second stage loads what the first one saves"
    # How the run itself was to load is done with.
    switched = replace(checkpoint, load=checkpoint.save, pretrained_checkpoint=None, ckpt_step=None, finetune=False)
    return [first, replace(second, checkpoint=replace(switched, no_load_optim=False, no_load_rng=False))]

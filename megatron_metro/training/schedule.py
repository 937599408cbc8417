"""Learning rate as a pure function of the number of completed updates.

Megatron-Core's OptimizerParamScheduler is not used: it cannot hold the rate during the warm-up
(`--lr-warmup-style constant`), refuses a run shorter than its warm-up, and carries a counter that a checkpoint would
have to restore. Where both know a shape they agree; a test compares them.

First update. The reference and Megatron both set the rate from the updates completed BEFORE it: update k runs at
lr(k-1), so with a linear warm-up the very first update runs at 0 (it fills Adam's moments and moves no weight). After
update k, Megatron's log line shows lr(k), the rate of the next one. A skipped update does not count.
"""

import math

from megatron_metro.config.schema import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, num_updates: int, train_iters: int) -> float:
    """lr(n) after n completed updates, which is the rate of update n + 1 (metro_t0_reference section 5).

    `inverse-square-root` is T5's 1 / sqrt(max(n, warm-up)), scaled so that its value at the end of the warm-up is
    `--lr`. Every decay but `constant` is at `--min-lr` after `--lr-decay-iters` updates.
    """
    warmup = optimizer.lr_warmup_iters
    if num_updates < warmup and optimizer.lr_warmup_style == "linear":
        return optimizer.lr * num_updates / warmup
    if num_updates <= warmup or optimizer.lr_decay_style == "constant":
        return optimizer.lr
    decay_iters = train_iters if optimizer.lr_decay_iters is None else optimizer.lr_decay_iters
    if num_updates > decay_iters:
        return optimizer.min_lr
    if optimizer.lr_decay_style == "inverse-square-root":
        return max(optimizer.min_lr, optimizer.lr * math.sqrt(max(warmup, 1) / num_updates))
    progress = (num_updates - warmup) / (decay_iters - warmup)
    share = 1.0 - progress if optimizer.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * progress) + 1.0)
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)

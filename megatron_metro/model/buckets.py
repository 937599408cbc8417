"""Buckets of relative positions: which row of a bias table a distance reads, in METRO and in T5."""

import math

import torch
from torch import Tensor


def metro_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance (key position - query position), int64 (reference section 1.4).

    Symmetric around bucket num_buckets/2 - 1 of distance 0; the last bucket of the table is never used.
    """
    zero_bucket = num_buckets // 2 - 1
    num_exact = num_buckets // 4
    length = distances.abs()
    octaves = torch.log(length.clamp(min=1).double() / num_exact) / math.log((max_distance - 1) / num_exact)
    rounded_up = num_exact + torch.ceil(octaves * (zero_bucket - num_exact)).long()
    bucket = torch.where(length < num_exact, length, rounded_up.clamp(max=zero_bucket))
    return zero_bucket + distances.sign() * bucket


def t5_buckets(distances: Tensor, num_buckets: int, max_distance: int, *, is_causal: bool) -> Tensor:
    """Bucket of each distance (key position - query position), int64, as in T5.

    In an encoder the upper half of the table is for keys after the query; in a causal decoder they all share bucket 0.
    The logarithm is taken in FP32, so that every distance falls where T5's own code puts it.
    """
    if is_causal:
        start, length = torch.zeros_like(distances), (-distances).clamp(min=0)
    else:
        num_buckets //= 2
        start, length = torch.where(distances > 0, num_buckets, 0), distances.abs()
    num_exact = num_buckets // 2
    octaves = torch.log(length.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    rounded_down = num_exact + (octaves * (num_buckets - num_exact)).long()
    return start + torch.where(length < num_exact, length, rounded_down.clamp(max=num_buckets - 1))

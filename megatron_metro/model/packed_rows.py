"""What is seen of a row and how its positions count: padding, and examples of a packed row that do not see each other.

The relative bias needs nothing of this: within an example, distances in the row are those in the example.
Shape letters: b sequences, s positions, q query positions, k key positions, m queries at slots.
"""

import torch
from torch import Tensor


def ignored_keys(
    padding_BK: Tensor | None, queries_BQ: Tensor | None = None, keys_BK: Tensor | None = None
) -> Tensor | None:
    """Bool, True at keys a query must ignore: [b, 1, 1, k] for padding, [b, 1, q, k] in packed rows, None for nothing.

    `queries_BQ` and `keys_BK` are their segments, int64. Padded keys share theirs with no query but padded ones.
    """
    if queries_BQ is not None and keys_BK is not None:
        return queries_BQ[:, None, :, None] != keys_BK[:, None, None, :]
    return None if padding_BK is None else padding_BK[:, None, None, :]


def take_queries(mask: Tensor | None, positions_BM: Tensor) -> Tensor | None:
    """The rows of a mask for queries at positions: [b, 1, q, k] to [b, 1, m, k]; one row for all queries stays."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask.gather(2, positions_BM[:, None, :, None].expand(-1, -1, -1, mask.shape[3]))


def count_positions(segments_BS: Tensor) -> Tensor:
    """[b, s] int64: positions from 0 within each example of a packed row."""
    places = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    is_first = segments_BS.diff(dim=1, prepend=segments_BS[:, :1]) != 0
    return places - torch.where(is_first, places, 0).cummax(dim=1).values

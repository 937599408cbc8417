"""Which units of the chain each pipeline rank holds: pure functions of sizes, without process groups.

A layout is the chain cut into PP x VPP contiguous pieces. Piece p is chunk p // PP of rank p % PP, the order in which
megatron-core's interleaved schedule passes the chunks. A piece may end one network and start the next.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from megatron_metro.config.chain import Unit, UnitKind
from megatron_metro.config.schema import ModelConfig
from megatron_metro.parallel.layout_text import LETTERS, LayoutError, expand

_EMBEDDINGS: tuple[UnitKind, ...] = ("generator_embedding", "encoder_embedding", "decoder_embedding")
_LAYERS: tuple[UnitKind, ...] = ("generator_layer", "encoder_layer", "decoder_layer")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLayout:
    """The chain in `pp_size` x `vpp_size` contiguous, non-empty pieces, in the order a microbatch passes them."""

    pieces: tuple[tuple[Unit, ...], ...]
    pp_size: int
    vpp_size: int = 1

    def __post_init__(self) -> None:
        assert len(self.pieces) == self.pp_size * self.vpp_size, "one piece per rank and chunk"
        assert all(self.pieces), "no piece is empty"

    @property
    def chain(self) -> tuple[Unit, ...]:
        """All units in order."""
        return tuple(unit for piece in self.pieces for unit in piece)

    @property
    def num_pieces(self) -> int:
        return len(self.pieces)

    def piece_index(self, rank: int, chunk: int = 0) -> int:
        """Position in the chain of what a pipeline rank holds as its `chunk`-th model chunk."""
        assert 0 <= rank < self.pp_size and 0 <= chunk < self.vpp_size
        return chunk * self.pp_size + rank

    def piece(self, rank: int, chunk: int = 0) -> tuple[Unit, ...]:
        """Units of one model chunk of a pipeline rank."""
        return self.pieces[self.piece_index(rank, chunk)]

    def place(self, piece_index: int) -> tuple[int, int]:
        """Pipeline rank and chunk of a piece: the inverse of `piece_index`."""
        assert 0 <= piece_index < self.num_pieces
        return piece_index % self.pp_size, piece_index // self.pp_size

    def pieces_holding(self, kinds: Collection[UnitKind]) -> tuple[int, ...]:
        """Indices of the pieces that hold at least one unit of the given kinds."""
        return tuple(i for i, piece in enumerate(self.pieces) if any(unit.kind in kinds for unit in piece))

    def is_last(self, piece_index: int) -> bool:
        return piece_index == self.num_pieces - 1

    def format(self) -> str:
        """The layout as a string that `parse` reads back, every unit named: "Gg*2M|e*4R|Dd*4L"."""
        return "|".join(format_units(piece) for piece in self.pieces)


def single_piece(chain: Sequence[Unit]) -> StageLayout:
    """The whole chain on one rank."""
    return StageLayout(pieces=(tuple(chain),), pp_size=1)


def parse(text: str, chain: Sequence[Unit], pp_size: int, vpp_size: int = 1) -> StageLayout:
    """Read a layout written by hand, in megatron-core's string form with the letters of `layout_text`.

    Layers must all be written. An embedding or head that is not written goes with its neighbour: an embedding
    (G, E, D) with the unit after it, a head (M, R, L) with the unit before it. Errors: LayoutError naming the nearest
    legal layout.
    """
    check_sizes(len(chain), pp_size, vpp_size)
    written = expand(text).split("|")
    problem = _find_problem(written, chain, pp_size * vpp_size)
    if problem is not None:
        nearest = _nearest(written, chain, pp_size, vpp_size)
        raise LayoutError(
            f'--pipeline-model-parallel-layout "{text}": {problem}; the nearest legal layout is "{nearest.format()}"'
        )
    sizes = [0] * len(written)
    for piece in _assign_pieces(written, chain):
        sizes[piece] += 1
    return _cut(chain, list(accumulate(sizes))[:-1], pp_size, vpp_size)


def balance(
    chain: Sequence[Unit],
    costs: Sequence[float],
    bytes_after: Sequence[float],
    pp_size: int,
    vpp_size: int = 1,
    extra_if_cut: Sequence[float] | None = None,
) -> StageLayout:
    """The layout whose costliest piece is as cheap as any layout's; among those, the one that sends the fewest bytes.

    `costs[i]` is the cost of unit i and `bytes_after[i]` the size of the message that leaves a piece ending with it
    (the last one is not read). A piece that ends with unit i before the end of the chain pays `extra_if_cut[i]` as
    well. Exact: dynamic programming over (pieces, units), once for each of the two criteria.
    """
    check_sizes(len(chain), pp_size, vpp_size)
    num_pieces = pp_size * vpp_size
    prefix = [0.0, *accumulate(costs)]  # of the first n units
    extras = [0.0] * len(chain) if extra_if_cut is None else [*extra_if_cut[:-1], 0.0]
    ends = [total + extra for total, extra in zip(prefix, [0.0, *extras])]  # and when a piece ends there
    limit = _smallest_maximum(prefix, ends, num_pieces)
    cuts = _cheapest_cuts(prefix, ends, bytes_after, num_pieces, limit * (1 + 1e-12))
    return _cut(chain, cuts, pp_size, vpp_size)


def check_sizes(num_units: int, pp_size: int, vpp_size: int) -> None:
    """Refuse a number of pieces that no layout of the chain can have."""
    if pp_size == 1 and vpp_size > 1:
        raise LayoutError(
            f"--num-virtual-stages-per-pipeline-rank {vpp_size} needs --pipeline-model-parallel-size 2 or more; "
            "use 1 virtual stage with 1 pipeline stage"
        )
    if pp_size * vpp_size > num_units:
        pp, vpp = min(pp_size, num_units), max(1, num_units // pp_size)
        raise LayoutError(
            f"--pipeline-model-parallel-size {pp_size} x --num-virtual-stages-per-pipeline-rank {vpp_size} makes "
            f"{pp_size * vpp_size} pieces of a model with {num_units} units; the nearest legal sizes are {pp} x {vpp}"
        )


def format_units(units: Sequence[Unit]) -> str:
    """Consecutive units as letters and counts: "RDd*3"."""
    runs = [(letter, len(list(run))) for letter, run in groupby(LETTERS[unit.kind] for unit in units)]
    return "".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs)


def shared_weights(layout: StageLayout, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Each weight that several units read, and the pieces that hold a copy of it (several, or only one).

    The names are those of the checkpoint. A weight that a single unit reads is not listed.
    """
    holders = {"word_embeddings.weight": layout.pieces_holding(_readers_of_word_embeddings(model))}
    if model.has_generator and model.generator_embedding_sharing == "token_pos_norm":
        readers: tuple[UnitKind, ...] = ("generator_embedding", "mlm_head")
        holders |= {name: layout.pieces_holding(readers) for name in _encoder_embedding_weights(model)}
    if model.relative_attention == "per_stack":
        stacks: dict[str, UnitKind] = {"generator": "generator_layer", "encoder": "encoder_layer"}
        if model.relative_attention_decoder:
            stacks["decoder"] = "decoder_layer"
        for network, kind in stacks.items():
            if pieces := layout.pieces_holding((kind,)):
                holders[f"{network}.relative_bias.weight"] = pieces
    return holders


def _readers_of_word_embeddings(model: ModelConfig) -> tuple[UnitKind, ...]:
    readers: tuple[UnitKind, ...] = ("generator_embedding", "mlm_head", "encoder_embedding", "decoder_embedding")
    return readers if model.untie_embeddings_and_output_weights else (*readers, "lm_head")


def _encoder_embedding_weights(model: ModelConfig) -> list[str]:
    """The weights besides the token matrix with which the encoder embeds its input."""
    names = []
    if model.position_embedding_type == "learned_absolute":
        names.append("encoder.position_embeddings.weight")
    if model.norm_placement == "post":
        names.append("encoder.embedding_norm.weight")
        names += ["encoder.embedding_norm.bias"] if model.normalization == "LayerNorm" else []
    return names


def _cut(chain: Sequence[Unit], cuts: Sequence[int], pp_size: int, vpp_size: int) -> StageLayout:
    """Cut before the units numbered `cuts`."""
    pieces = tuple(tuple(chain[start:end]) for start, end in pairwise([0, *cuts, len(chain)]))
    return StageLayout(pieces=pieces, pp_size=pp_size, vpp_size=vpp_size)


def _find_problem(written: Sequence[str], chain: Sequence[Unit], num_pieces: int) -> str | None:
    """What keeps the written pieces from being a layout of the chain; None when nothing does."""
    if len(written) != num_pieces:
        return f"{len(written)} pieces where pipeline size x virtual stages asks for {num_pieces}"
    if "" in written:
        return f"piece {written.index('')} is empty"
    known = {LETTERS[unit.kind]: unit.kind for unit in chain}
    for letter in "".join(written):
        if letter not in known:
            return f'letter "{letter}" names no unit of this model, whose letters are {"".join(known)}'
    for letter, kind in known.items():
        found, expected = "".join(written).count(letter), sum(unit.kind == kind for unit in chain)
        if found != expected and (kind in _LAYERS or found > 1):
            return f'"{letter}" ({kind}) is written {found} times and the model has {expected}'
    order = [list(known).index(letter) for letter in "".join(written)]
    if order != sorted(order):
        return f"units are not in the order {''.join(known)}"
    return None


def _assign_pieces(written: Sequence[str], chain: Sequence[Unit]) -> list[int]:
    """The piece of every unit; units that are not written follow their neighbour."""
    given = [(letter, index) for index, piece in enumerate(written) for letter in piece]
    assigned: list[int | None] = []
    for unit in chain:
        if given and given[0][0] == LETTERS[unit.kind]:
            assigned.append(given.pop(0)[1])
        else:
            assigned.append(None)
    pieces: list[int] = []
    for position, unit in enumerate(chain):
        candidates = [piece for piece in assigned[position:] if piece is not None]
        follows = assigned[position] is None and unit.kind not in _EMBEDDINGS
        pieces.append(pieces[-1] if follows else candidates[0])
    return pieces


def _nearest(written: Sequence[str], chain: Sequence[Unit], pp_size: int, vpp_size: int) -> StageLayout:
    """The legal layout whose pieces have nearly the written proportions."""
    num_pieces, num_units = pp_size * vpp_size, len(chain)
    ends = [0, *accumulate(len(piece) for piece in written)]
    scale = num_units / ends[-1] if ends[-1] else 0.0
    cuts: list[int] = []
    for number in range(1, num_pieces):
        whole, rest = divmod(number * len(written), num_pieces)
        wanted = ends[whole] + (ends[whole + 1] - ends[whole]) * rest / num_pieces if rest else ends[whole]
        smallest, largest = (cuts[-1] + 1 if cuts else 1), num_units - (num_pieces - number)
        cuts.append(min(max(round(wanted * scale), smallest), largest))
    return _cut(chain, cuts, pp_size, vpp_size)


def _smallest_maximum(prefix: Sequence[float], ends: Sequence[float], num_pieces: int) -> float:
    """Cost of the costliest piece in the best cut of the chain, where units m to n - 1 cost ends[n] - prefix[m]."""
    num_units = len(prefix) - 1
    best = list(ends)  # best[n]: the first n units in the pieces counted so far
    for pieces in range(2, num_pieces + 1):
        best = [
            min((max(best[m], ends[n] - prefix[m]) for m in range(pieces - 1, n)), default=float("inf"))
            for n in range(num_units + 1)
        ]
    return best[num_units]


def _cheapest_cuts(
    prefix: Sequence[float], ends: Sequence[float], bytes_after: Sequence[float], num_pieces: int, limit: float
) -> list[int]:
    """Cuts that send the fewest bytes while no piece costs more than `limit`."""
    num_units = len(prefix) - 1
    nothing_sent: list[int] = []
    best = [(0.0 if end <= limit else float("inf"), nothing_sent) for end in ends]
    for pieces in range(2, num_pieces + 1):
        best = [
            min(
                (
                    (best[m][0] + bytes_after[m - 1], [*best[m][1], m])
                    for m in range(pieces - 1, n)
                    if ends[n] - prefix[m] <= limit and best[m][0] < float("inf")
                ),
                default=(float("inf"), []),
            )
            for n in range(num_units + 1)
        ]
    total, cuts = best[num_units]
    assert total < float("inf"), "the limit is the cost of a layout that exists"
    return cuts

"""The string form of a layout: megatron-core's grammar with one letter for every kind of unit of our chain.

Letters: G g generator embedding and layer, M MLM head (with sampling and the encoder's embedding), E encoder embedding
(only without a generator), e encoder layer, R encoder head (RTD, final norm), D and d decoder embedding and layer,
L LM head. `|` separates pieces, `x*3` repeats a letter, `(e|)*3` repeats a group; commas and blanks are skipped.
"""

from megatron_metro.config.chain import UnitKind
from megatron_metro.config.errors import ConfigError

LETTERS: dict[UnitKind, str] = {
    "generator_embedding": "G",
    "generator_layer": "g",
    "mlm_head": "M",
    "encoder_embedding": "E",
    "encoder_layer": "e",
    "encoder_head": "R",
    "decoder_embedding": "D",
    "decoder_layer": "d",
    "lm_head": "L",
}
_LONGEST = 10_000  # letters after expansion; far above any model, far below what would exhaust memory


class LayoutError(ConfigError):
    """A layout that the model cannot be cut into; one line, with the nearest legal one."""


def expand(text: str) -> str:
    """Write out all repetitions: "(e*2|)*2d" becomes "ee|ee|d". Errors: LayoutError naming the place."""
    symbols = [symbol for symbol in text if symbol not in ", \t"]
    groups = [""]  # what is written so far, one entry per open parenthesis and one for the whole
    last = ""  # what a repetition would repeat
    position = 0
    while position < len(symbols):
        symbol = symbols[position]
        position += 1
        if symbol == "(":
            groups.append("")
            last = ""
        elif symbol == ")":
            if len(groups) == 1:
                raise _error(text, 'a ")" closes no "("')
            last = groups.pop()
            groups[-1] += last
        elif symbol == "*":
            count, position = _read_count(text, symbols, position)
            if not last:
                raise _error(text, 'a "*" follows nothing to repeat')
            if len(last) * count > _LONGEST:
                raise _error(text, f"more than {_LONGEST} units")
            groups[-1] += last * (count - 1)
            last = ""
        else:
            last = symbol
            groups[-1] += last
    if len(groups) > 1:
        raise _error(text, 'a "(" is not closed')
    return groups[0]


def _read_count(text: str, symbols: list[str], position: int) -> tuple[int, int]:
    """The number at `position` and the position after it."""
    end = position
    while end < len(symbols) and symbols[end].isdecimal():
        end += 1
    digits = "".join(symbols[position:end])
    if not digits or not 1 <= int(digits) <= _LONGEST:
        raise _error(text, f'a "*" needs a count of 1 to {_LONGEST}, found "{digits}"')
    return int(digits), end


def _error(text: str, problem: str) -> LayoutError:
    return LayoutError(f'--pipeline-model-parallel-layout "{text}": {problem}; an example is "Gg*2M|e*4R|Dd*2|d*2L"')

"""What the quickstart prints of restored blocks."""

from examples.quickstart_report import format_block, format_summary, rank_replaced
from megatron_metro.inference.restore import Restoration
from megatron_metro.tokenizer import NullTokenizer


def make_block(probs: tuple[float, ...] = (0.1, 0.2, 0.9, 0.3, 0.2)) -> Restoration:
    """Masked at 0, 2 and 4; the generator is wrong at 2 and 4, the decoder at 0 and 4."""
    return Restoration(
        original_ids=(10, 11, 12, 13, 14),
        masked_slots=(0, 2, 4),
        filled_ids=(10, 11, 20, 13, 21),
        replaced_probs=probs,
        restored_ids=(30, 12, 31),
    )


def test_a_block_shows_what_was_hidden_filled_suspected_and_restored():
    masked, filled, verdicts, restored = format_block(make_block(), NullTokenizer(64, 8)).splitlines()[1:8:2]
    assert masked.strip() == "____11____13____"
    assert filled.strip() == "(10)11[20]13[21]"
    assert verdicts.strip().startswith("20 0.90 caught, 21 0.20 missed, 0 false alarms among 3 other tokens, 0.20")
    assert restored.strip() == "[30]11(12)13[31]"


def test_ranking_counts_pairs():
    # 0.9 is above all three others; 0.2 is above one, equal to one, below one.
    assert rank_replaced([make_block()]) == (3 + 1.5) / 6
    assert rank_replaced([make_block((0.5,) * 5)]) == 0.5


def test_summary_counts_all_blocks():
    summary = format_summary([make_block(), make_block()])
    assert "in 2 held-out blocks" in summary
    assert summary.endswith("corrupted positions restored: 2 of 4 (50.0 %)")

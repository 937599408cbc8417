"""METRO's released tokenizer for transformers: pre-tokeniser, SentencePiece, sentinels (reference section 8.4).

`megatron_metro.conversion.hf` registers it. Text that spells a special token or a sentinel stays text.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from megatron_metro.tokenizer import Tokenizer

_SPACE = "\u2581"


class FairseqT5Tokenizer(PreTrainedTokenizer):
    """One text becomes `<s> ... </s>`, a pair `<s> ... </s></s> ... </s>`."""

    vocab_files_names = {"sp_path": "sp.model", "dict_path": "dict.txt"}  # noqa: RUF012 (transformers' own convention)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        sp_path: str,
        dict_path: str | None = None,
        lower: bool = True,
        n_sentinel_tokens: int = 0,
        pre_tokenizer: str | None = None,
        **options: Any,
    ) -> None:
        """`dict_path` names what is in the model already; without `pre_tokenizer` words are split as was released."""
        self.sp_path, self.dict_path = sp_path, dict_path
        pre_tokenizer = pre_tokenizer or ("metro-lower" if lower else "metro")
        self._text = Tokenizer.load(sp_path, n_sentinel_tokens, pre_tokenizer)
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        self._names = [self._name(token, list(special.values())) for token in range(self._text.vocab_size)]
        self._ids = {name: token for token, name in enumerate(self._names)}
        options = {**special, "sep_token": "</s>", "cls_token": "<s>", "clean_up_tokenization_spaces": True, **options}
        options["split_special_tokens"] = True
        super().__init__(lower=lower, n_sentinel_tokens=n_sentinel_tokens, pre_tokenizer=pre_tokenizer, **options)

    def _name(self, token: int, special: list[str]) -> str:
        if token in (0, 1, 2, 3):
            return self._text.piece(token)
        return self._text.name_piece(token) if token < self._text.num_pieces else self._text.piece(token)

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels."""
        return self._text.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Ids by name."""
        return dict(self._ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self._names[token] for token in self._text.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._text.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pieces to text."""
        return "".join(tokens).replace(_SPACE, " ").strip()

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one text or two with the special ones around them."""
        start, end = [self.cls_token_id], [self.sep_token_id]
        second = [] if token_ids_1 is None else [*end, *token_ids_1, *end]
        return [*start, *token_ids_0, *end, *second]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at special tokens, 0 at text."""
        if already_has_special_tokens:
            mask: list[int] = super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
            return mask
        second = [] if token_ids_1 is None else [1, *[0] * len(token_ids_1), 1]
        return [1, *[0] * len(token_ids_0), 1, *second]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros: the model tells no segments apart."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies of the model and of its dictionary."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        saved = []
        for path, name in ((self.sp_path, "sp.model"), (self.dict_path, "dict.txt")):
            if path is not None:
                target = Path(save_directory) / (prefix + name)
                if Path(path).resolve() != target.resolve():
                    shutil.copyfile(path, target)
                saved.append(str(target))
        return tuple(saved)

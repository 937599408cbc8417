"""Import this to let transformers load METRO's models and tokenizers by themselves, without remote code:

    import megatron_metro.conversion.hf
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)

It imports transformers, which training does without.
"""

from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from megatron_metro.conversion.fairseq_t5 import FairseqT5Config, FairseqT5ForConditionalGeneration
from megatron_metro.conversion.fairseq_tokenizer import FairseqT5Tokenizer

AutoConfig.register(FairseqT5Config.model_type, FairseqT5Config)
AutoModelForSeq2SeqLM.register(FairseqT5Config, FairseqT5ForConditionalGeneration)
AutoTokenizer.register(FairseqT5Config, slow_tokenizer_class=FairseqT5Tokenizer)

__all__ = [
    "AutoModelForSeq2SeqLM",
    "FairseqT5Config",
    "FairseqT5ForConditionalGeneration",
    "FairseqT5Tokenizer",
    "logging",
]

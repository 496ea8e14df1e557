"""A tokenizer for the toy instruction set, built in code: about 400 tokens, and any text survives a round trip."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Rises when the same text would give other token ids: it stands for the tokenizer in the ids of artifacts.
VERSION = 1

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|end|>"
MAX_LENGTH = 512

# The fixed strings of the Alpaca template, each one token inside a prompt: a toy prompt is about 13 tokens long.
TEMPLATE_STRINGS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:\n",
)
# Every word of `pocl_cli.data.generators.toy_tasks`, which this layer must not import; a test compares the two.
_WORD_LIST = """
    Add Change Copy Count Extract Find Give How Keep Look Order Remove Repeat Replace Reverse Say Sort Turn What
    Which Write above after again age alphabet alphabetical and animal apple are around axe black blue brown brush
    by cat class colour comes cow dog down drill each else every fig first fourth fox from fruit grape green hammer
    has hen highest if in into is it kiwi knife largest last lemon list lowest mango many maximum minimum more
    number numbers of once only order owl peach pig pink place plum rake rat red repeated saw second size smallest
    sum than the there third times to tool up white with word words wrench yellow
"""
WORDS = tuple(_WORD_LIST.split())
DIGITS = tuple("0123456789")
_INNER_LINE_START = r"\n(?=[^\n])"


def build_toy_tokenizer() -> PreTrainedTokenizerFast:
    """The toy tokenizer, padding on the left, which `save_pretrained` and `AutoTokenizer` write and read without code.

    Every text is read as if each line began with one more space, and decoding takes these spaces away: so the first
    word of a line is the same token as elsewhere, and a prompt's tokens and a response's are those of the two joined.
    What is not a whole word, a digit or a template string is spelt in bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    template = [_as_inside_a_text(string) for string in TEMPLATE_STRINGS]
    pieces = [*(re.escape(string) for string in template), " ?[A-Za-z]+", " ?[0-9]"]
    backend = Tokenizer(BPE(vocab=_vocabulary(template), merges=[], ignore_merges=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(_INNER_LINE_START), "\n "), normalizers.Prepend(" ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(pieces)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "<|end|>" in a row's text is text
    )


def _as_inside_a_text(string: str) -> str:
    """A template string as the normalizer leaves it; the two that do not begin with a line break begin a text."""
    spaced = re.sub(_INNER_LINE_START, "\n ", string)
    return spaced if spaced.startswith("\n") else f" {spaced}"


def _vocabulary(template: list[str]) -> dict[str, int]:
    """Token → id: pad, end, the template's strings, words and digits (each with its leading space), the 256 bytes."""
    from tokenizers import pre_tokenizers

    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    whole = [spell(text)[0][0] for text in (*template, *(f" {text}" for text in (*WORDS, *DIGITS)))]
    tokens = [PAD_TOKEN, EOS_TOKEN, *whole, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(set(tokens)) == len(tokens), "a token is listed twice"
    return {token: index for index, token in enumerate(tokens)}

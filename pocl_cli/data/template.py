"""The Alpaca prompt, and a record's token ids.

The prompt's last lines ("### Response:") tell the model to answer: a prompt that is too long loses text of the row,
never of the template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pocl_cli.data.dropped import NO_ROOM, NO_TOKENS, SPECIAL_TOKEN, long_prompt
from pocl_cli.data.token_ids import dropped, eos_id, longest_beginning, special_ids, token_ids
from pocl_cli.errors import ConfigError
from pocl_cli.records import DroppedRow, Record, TokenisedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def render_prompt(instruction: str, input: str) -> str:
    """The Alpaca template filled in; a blank input counts as none."""
    if input.strip():
        return _WITH_INPUT.format(instruction=instruction, input=input)
    return _WITHOUT_INPUT.format(instruction=instruction)


class RowEncoder:
    """Turns records into token ids.

    Prompt and response are tokenised apart, without special tokens; the names of special tokens in a row's text are
    text. EOS ends the response unless it was cut to fit into `max_tokens`.

    Args:
        tokenizer: needs an EOS token.
        max_tokens: most tokens of prompt and response together, EOS included.
        max_prompt_tokens: most tokens of the prompt.
        long_prompts: "cut" shortens the input from its tail, then (and then in the template without input) the
            instruction, each at the end of a token; "drop" leaves the row out.

    Raises:
        ConfigError: the tokenizer has no EOS token, or the empty template is longer than `max_prompt_tokens`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        max_prompt_tokens: int,
        long_prompts: Literal["cut", "drop"],
    ) -> None:
        self.tokenizer, self.max_tokens, self.max_prompt_tokens = tokenizer, max_tokens, max_prompt_tokens
        self.drops_long_prompts = long_prompts == "drop"
        self.eos_id = eos_id(tokenizer)
        self._special_ids = special_ids(tokenizer)
        num_template = len(self._ids([render_prompt("", "")])[0])
        if num_template >= max_prompt_tokens:
            raise ConfigError(
                f"dataset.max_prompt_tokens={max_prompt_tokens} leaves no room for an instruction",
                why=f"the prompt template alone has {num_template} tokens",
                fix=f"set dataset.max_prompt_tokens well above {num_template}",
            )

    def encode(self, record: Record) -> TokenisedRow | DroppedRow:
        """The record's token ids, or the reason why it has none."""
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Sequence[Record]) -> list[TokenisedRow | DroppedRow]:
        """As `encode` for each record; several at once are several times faster."""
        prompts = self._ids([render_prompt(record.instruction, record.input) for record in records])
        responses = self._ids([record.response for record in records])
        return [self._row(*parts) for parts in zip(records, prompts, responses, strict=True)]

    def _row(self, record: Record, prompt_ids: list[int], response_ids: list[int]) -> TokenisedRow | DroppedRow:
        prompt_cut = len(prompt_ids) > self.max_prompt_tokens
        if prompt_cut and self.drops_long_prompts:
            return dropped(record, long_prompt(self.max_prompt_tokens))
        if prompt_cut:
            shortened = self._shortened(record.instruction, record.input)
            if shortened is None:
                return dropped(record, NO_ROOM)
            (prompt_ids,) = self._ids([shortened])
        if not response_ids:
            return dropped(record, NO_TOKENS)
        if not self._special_ids.isdisjoint(prompt_ids) or not self._special_ids.isdisjoint(response_ids):
            return dropped(record, SPECIAL_TOKEN)
        room = self.max_tokens - len(prompt_ids)
        response_cut = len(response_ids) + 1 > room
        response_ids = response_ids[:room] if response_cut else [*response_ids, self.eos_id]
        return TokenisedRow(record.id, prompt_ids, response_ids, prompt_cut, response_cut)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return token_ids(self.tokenizer, texts)

    def _shortened(self, instruction: str, input: str) -> str | None:
        """The longest prompt that fits, or None where not even the first token of the instruction does."""
        if input.strip():
            kept = self._longest(input, lambda part: render_prompt(instruction, part))
            if kept.strip():
                return render_prompt(instruction, kept)
            if self._fits(render_prompt(instruction, "")):
                return render_prompt(instruction, "") if instruction.strip() else None
        kept = self._longest(instruction, lambda part: render_prompt(part, ""))
        return render_prompt(kept, "") if kept.strip() else None

    def _longest(self, text: str, render: Callable[[str], str]) -> str:
        """The longest beginning of `text`, up to the end of a token, whose prompt fits; all of `text` does not."""
        return longest_beginning(text, lambda part: self._fits(render(part)), self.tokenizer, self.max_prompt_tokens)

    def _fits(self, prompt: str) -> bool:
        return len(self._ids([prompt])[0]) <= self.max_prompt_tokens

"""The token ids of a conversation under the tokenizer's own chat template, whose last answer is the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from pocl_cli.data.dropped import NO_ROOM, NO_TOKENS, SPECIAL_TOKEN, long_prompt
from pocl_cli.data.token_ids import dropped, eos_id, longest_beginning, special_ids, token_ids
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import DroppedRow, Record, TokenisedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = tuple[tuple[str, str], ...]


class ChatEncoder:
    """Turns conversations into token ids.

    The prompt is the template over all turns before the answer, with the words that call for one (the generation
    prompt); the response is what the template writes for the answer itself. It ends with EOS: the template's own, or
    one that is appended where the template writes nothing behind the answer. The template runs in transformers'
    sandbox. Turns that hold the name of a special token are left out: they could pretend to be turns of others.

    Args:
        tokenizer: needs an EOS token and a chat template.
        max_tokens: most tokens of prompt and response together, EOS included.
        max_prompt_tokens: most tokens of the prompt.
        long_prompts: "cut" leaves out the earliest exchanges (a system turn stays), then shortens the last turn from
            its tail; "drop" leaves the row out.

    Raises:
        ConfigError: the tokenizer has no EOS token or no chat template.
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
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template",
                where=str(tokenizer.name_or_path) or None,
                why="dataset.format=messages renders conversations with it",
                fix="choose a model that was made for conversations, or dataset.format=instruction",
            )
        names = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        self._special_names = [name for name in names if name]

    def encode_batch(self, records: Sequence[Record]) -> list[TokenisedRow | DroppedRow]:
        """Each record's token ids, or the reason why it has none.

        Raises DataError where the template refuses a conversation, or does not end it with its answer.
        """
        return [self._row(record) for record in records]

    def _row(self, record: Record) -> TokenisedRow | DroppedRow:
        assert record.turns is not None, "a conversation has turns"
        texts = [record.response, *(text for _, text in record.turns)]
        if any(name in text for name in self._special_names for text in texts):
            return dropped(record, SPECIAL_TOKEN)
        turns = record.turns
        prompt_cut = not self._fits(record, turns)
        if prompt_cut and self.drops_long_prompts:
            return dropped(record, long_prompt(self.max_prompt_tokens))
        if prompt_cut:
            shortened = self._shortened(record, turns)
            if shortened is None:
                return dropped(record, NO_ROOM)
            turns = shortened
        prompt = self._rendered(record, turns, asks=True)
        prompt_ids, response_ids = self._ids(prompt, self._answer(record, turns, prompt))
        if not response_ids:
            return dropped(record, NO_TOKENS)
        room = self.max_tokens - len(prompt_ids)
        response_cut = len(response_ids) + 1 > room
        response_ids = response_ids[:room] if response_cut else [*response_ids, self.eos_id]
        return TokenisedRow(record.id, prompt_ids, response_ids, prompt_cut, response_cut)

    def _answer(self, record: Record, turns: Turns, prompt: str) -> str:
        """What the template writes for the response, without EOS and what follows it."""
        whole = self._rendered(record, (*turns, ("assistant", record.response)), asks=False)
        if not whole.startswith(prompt):
            raise _unusable(record, "the conversation with its answer does not begin like the prompt for the answer")
        answer = whole[len(prompt) :]
        text = record.response.strip()
        end = answer.rfind(text) + len(text)
        if text not in answer:
            raise _unusable(record, "the answer is not in what it writes after the prompt")
        eos = str(self.tokenizer.eos_token)
        closing = answer[end:].strip()
        if closing not in ("", eos):
            raise _unusable(record, f"it ends the answer with {closing[:40]!r}, where EOS is {eos!r}")
        return answer[:end]

    def _rendered(self, record: Record, turns: Turns, *, asks: bool) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except (TemplateError, ValueError, TypeError) as error:
            raise _unusable(record, f"it refuses the conversation: {error}") from error
        assert isinstance(rendered, str), "one conversation is one text"
        return rendered

    def _ids(self, *rendered: str) -> list[list[int]]:
        return token_ids(self.tokenizer, rendered, names_are_text=False)

    def _fits(self, record: Record, turns: Turns) -> bool:
        return len(self._ids(self._rendered(record, turns, asks=True))[0]) <= self.max_prompt_tokens

    def _shortened(self, record: Record, turns: Turns) -> Turns | None:
        """As many of the latest turns as fit; None where not even the first token of the last one does."""
        systems = turns[:1] if turns[0][0] == "system" else ()
        rest = turns[len(systems) :]
        beginnings = [number for number, (role, _) in enumerate(rest) if role == "user" and number > 0]
        for beginning in beginnings:
            if self._fits(record, (*systems, *rest[beginning:])):
                return (*systems, *rest[beginning:])
        if not rest:
            return None
        *before, (role, text) = rest[beginnings[-1] :] if beginnings else rest

        def with_last(part: str) -> Turns:
            return (*systems, *before, (role, part))

        kept = longest_beginning(
            text, lambda part: self._fits(record, with_last(part)), self.tokenizer, self.max_prompt_tokens
        )
        return with_last(kept) if kept.strip() else None


def _unusable(record: Record, why: str) -> DataError:
    return DataError(
        "the tokenizer's chat template does not fit the conversation",
        where=record.where or f"record {record.id}",
        why=why,
        fix="mend or remove the row, or choose a model with another template",
    )

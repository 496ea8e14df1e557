"""Which columns of a source hold the instruction, the input and the response, and their texts in one row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pocl_cli.data.dropped import (
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    EMPTY_TEXT,
    LONE_SURROGATE,
    MULTI_TURN,
    NO_ANSWER,
    NOT_A_PAIR,
)
from pocl_cli.data.rows import TEXT, SourceRow, json_type
from pocl_cli.errors import DataError, nearest
from pocl_cli.schema import FieldsConfig

# The names that the common data sets use; where a row has several of them, the first counts.
INSTRUCTION_NAMES = ("instruction", "prompt", "question", "query")
INPUT_NAMES = ("input", "context")
OUTPUT_NAMES = ("output", "outputs", "response", "completion", "answer", "target", "references")
CATEGORY_NAMES = ("category", "topic")
CONVERSATION_NAMES = ("messages", "conversations")
Format: TypeAlias = Literal["instruction", "text", "messages"]
_NAMES_SHOWN, _NAME_CHARACTERS = 20, 40
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one row's texts: `conversation`, or `instruction` and `output`, or `output` for plain text."""

    instruction: str | None
    input: str | None
    output: str | None
    category: str | None
    conversation: str | None


@dataclass(frozen=True, slots=True)
class RowText:
    """The texts of one row, as the source holds them; `turns` of a conversation as in `Record`."""

    instruction: str
    input: str
    references: tuple[str, ...]
    category: str | None
    turns: tuple[tuple[str, str], ...] | None = None


class FieldReader:
    """Takes the texts out of the rows of one source, whose rows may have different columns.

    Args:
        wanted: the configured names of the columns; null ones are recognised.
        format: what a row is.
    """

    def __init__(self, wanted: FieldsConfig, format: Format = "instruction") -> None:
        self.wanted, self.format = wanted, format
        self._known: dict[tuple[str, ...], Columns] = {}

    def read(self, row: SourceRow) -> RowText | str:
        """The row's texts, or the reason why it is not used.

        Raises:
            DataError: a needed column is missing, or a column holds something else than text.
        """
        names = tuple(row.values)
        if names not in self._known:
            self._known[names] = recognise(names, self.wanted, row.where, self.format)
        columns = self._known[names]
        if columns.conversation is not None and self.format == "messages":
            texts = _from_turns(row, columns)
        else:
            texts = _texts(row, columns)
        return texts if isinstance(texts, str) else _unusable(texts, asks=self.format != "text") or texts

    def check_optional(self, where: str) -> None:
        """Raises DataError where no row read so far has the configured input or category column.

        Such a column may be absent from single rows of a JSON lines file, so that only all rows together tell.
        """
        present = {name for names in self._known for name in names}
        for role, name in (("input", self.wanted.input), ("category", self.wanted.category)):
            if self._known and name is not None and name not in present:
                raise _missing(role, name, sorted(present), sorted(present), where)


def recognise(names: Iterable[str], wanted: FieldsConfig, where: str, format: Format = "instruction") -> Columns:
    """The columns among `names` that hold a row's texts. Raises DataError where one that is needed is missing."""
    present = list(names)
    taken = {name for name in (wanted.instruction, wanted.input, wanted.output, wanted.category) if name is not None}

    def find(explicit: str | None, usual: tuple[str, ...]) -> str | None:
        candidates = tuple(name for name in usual if name not in taken) if explicit is None else (explicit,)
        return next((name for name in candidates if name in present), None)

    category = find(wanted.category, CATEGORY_NAMES)
    if format == "text":
        text = find(wanted.output, (TEXT,))
        if text is None:
            free = [name for name in present if name != category]
            raise _missing("output", wanted.output, present, free, where, usual=(TEXT,), what="text")
        return Columns(None, None, text, category, None)
    if format == "messages":
        conversation = find(wanted.instruction, CONVERSATION_NAMES)
        if conversation is None:
            free = [name for name in present if name != category]
            raise _missing(
                "instruction", wanted.instruction, present, free, where, usual=CONVERSATION_NAMES, what="conversation"
            )
        return Columns(None, None, None, category, conversation)
    instruction, output = find(wanted.instruction, INSTRUCTION_NAMES), find(wanted.output, OUTPUT_NAMES)
    if wanted.instruction is None and wanted.output is None and (instruction is None or output is None):
        conversation = find(None, CONVERSATION_NAMES)
        if conversation is not None:
            return Columns(None, None, None, category, conversation)
    columns = Columns(instruction, find(wanted.input, INPUT_NAMES), output, category, None)
    used = {columns.instruction, columns.input, columns.output, columns.category}
    free = [name for name in present if name not in used]
    if instruction is None:
        raise _missing("instruction", wanted.instruction, present, free, where)
    if output is None:
        raise _missing("output", wanted.output, present, free, where)
    return columns


def _missing(
    role: str,
    explicit: str | None,
    present: Iterable[str],
    free: Iterable[str],
    where: str,
    *,
    usual: tuple[str, ...] | None = None,
    what: str | None = None,
) -> DataError:
    """The error for a column that is not there; `what` it holds and its `usual` names, where the role does not tell."""
    if usual is None:
        usual = {"instruction": INSTRUCTION_NAMES, "output": OUTPUT_NAMES}.get(role, ())
    candidates = [name for name in free if len(name) <= _NAME_CHARACTERS]
    guess = nearest(explicit or role, candidates) or (candidates[0] if candidates else "COLUMN")
    shown = [repr(name if len(name) <= _NAME_CHARACTERS else f"{name[:_NAME_CHARACTERS]}…") for name in present]
    more = f", and {len(shown) - _NAMES_SHOWN} more" if len(shown) > _NAMES_SHOWN else ""
    why = f"its columns are {', '.join(shown[:_NAMES_SHOWN]) or 'none'}{more}"
    if explicit is None:
        why += f"; names that are recognised are {', '.join(usual)}"
    missing = f"no column {explicit!r}" if explicit is not None else f"no column for the {what or role}"
    fix = f"name the column: dataset.fields.{role}={guess}"
    if TEXT in present and what is None:
        fix += ", or set dataset.format=text for plain text"
    return DataError(
        missing, where=where, why=why, fix=fix if usual else f"{fix}, or null to recognise the usual names"
    )


def _texts(row: SourceRow, columns: Columns) -> RowText | str:
    category = _category(row.values.get(columns.category) if columns.category else None)
    if columns.conversation is not None:
        return _from_conversation(row, columns.conversation, category)
    assert columns.output is not None, "recognise() makes sure of it"
    if columns.instruction is None:
        text = _text(row, columns.output, "output")
        return RowText("", "", (text,), category) if text.strip() else EMPTY_TEXT
    return RowText(
        instruction=_text(row, columns.instruction, "instruction"),
        input=_text(row, columns.input, "input") if columns.input is not None else "",
        references=_references(row, columns.output),
        category=category,
    )


def _text(row: SourceRow, column: str, role: str) -> str:
    value = row.values[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong_type(row, column, value, role, "text is expected")
    return value


def _references(row: SourceRow, column: str) -> tuple[str, ...]:
    value = row.values[column]
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if entry is not None and not isinstance(entry, str):
            raise _wrong_type(row, column, entry, "output", "text or a list of texts is expected")
    return tuple(entry for entry in entries if entry is not None and entry.strip())


def _category(value: Any) -> str | None:
    # Only for people to read: a column of that name which holds something else is no reason to refuse the data.
    return str(value) if isinstance(value, str | int) else None


def _wrong_type(row: SourceRow, column: str, value: Any, role: str, why: str) -> DataError:
    return DataError(
        f"column {column!r} holds {json_type(value)}",
        where=row.where,
        why=why,
        fix=f"mend the row, or take another column: dataset.fields.{role}=NAME",
    )


def _from_conversation(row: SourceRow, column: str, category: str | None) -> RowText | str:
    turns = [_turn(row, column, turn) for turn in _list(row, column)]
    systems = [text for role, text in turns[:1] if role == "system"]
    rest = turns[len(systems) :]
    roles = [role for role, _ in rest]
    if max(roles.count("user"), roles.count("assistant")) > 1:
        return MULTI_TURN
    if roles != ["user", "assistant"]:
        return NOT_A_PAIR
    question, answer = rest[0][1], rest[1][1]
    instruction = "\n\n".join([*(text for text in systems if text.strip()), question])
    if not question.strip():
        return EMPTY_PROMPT
    return RowText(instruction, "", (answer,) if answer.strip() else (), category)


def _from_turns(row: SourceRow, columns: Columns) -> RowText | str:
    """The last turn of the assistant is the response; what comes after it is left out."""
    column = columns.conversation
    assert column is not None, "recognise() makes sure of it"
    turns = [_named_turn(row, column, turn) for turn in _list(row, column)]
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        return NO_ANSWER
    before, answer = tuple(turns[: answers[-1]]), turns[answers[-1]][1]
    if not any(text.strip() for _, text in before):
        return EMPTY_PROMPT
    references = (answer,) if answer.strip() else ()
    return RowText(before[-1][1], "", references, _category(row.values.get(columns.category or "")), before)


def _list(row: SourceRow, column: str) -> list[Any]:
    value = row.values[column]
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong_type(row, column, value, "instruction", "a list of turns is expected")
    return value


def _named_turn(row: SourceRow, column: str, turn: Any) -> tuple[str, str]:
    """A turn under the name of its role, which the chat template knows or refuses."""
    _, text = _turn(row, column, turn)
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str):
        raise _wrong_type(row, column, role, "instruction", "a turn has a role: system, user or assistant")
    return _ROLES.get(role, role), text


def _turn(row: SourceRow, column: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise _wrong_type(row, column, turn, "instruction", "turns are objects with role and content")
    role = turn.get("role") or turn.get("from")
    text = turn.get("content") or turn.get("value")
    if text is not None and not isinstance(text, str):
        raise _wrong_type(row, column, text, "instruction", "the content of a turn is text")
    return _ROLES.get(role, "other") if isinstance(role, str) else "other", text or ""


def _unusable(texts: RowText, *, asks: bool) -> str | None:
    turns = [text for turn in texts.turns or () for text in turn]
    every = (texts.instruction, texts.input, *texts.references, texts.category or "", *turns)
    if any(map(_has_lone_surrogate, every)):
        return LONE_SURROGATE
    if asks and texts.turns is None and not texts.instruction.strip() and not texts.input.strip():
        return EMPTY_PROMPT
    return None if texts.references else EMPTY_RESPONSE


def _has_lone_surrogate(text: str) -> bool:
    # JSON escapes can name half a pair; no encoding, and so no tokenizer, takes it.
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False

"""Column recognition and the texts of one row."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_cli.data.dropped import EMPTY_PROMPT, EMPTY_RESPONSE, LONE_SURROGATE, MULTI_TURN, NOT_A_PAIR
from pocl_cli.data.fields import FieldReader, RowText
from pocl_cli.data.rows import SourceRow
from pocl_cli.errors import DataError
from pocl_cli.schema import FieldsConfig


def read(values: dict[str, Any], **explicit: str) -> RowText | str:
    names = {"instruction": None, "input": None, "output": None, "category": None, **explicit}
    reader = FieldReader(FieldsConfig.model_validate(names))
    return reader.read(SourceRow("rows.jsonl:17", "data/rows.jsonl:17", values))


@pytest.mark.parametrize("output", ["output", "outputs", "response", "completion", "answer", "target", "references"])
@pytest.mark.parametrize("instruction", ["instruction", "prompt", "question", "query"])
def test_columns_when_named_as_usual_then_are_recognised(instruction: str, output: str) -> None:
    assert read({instruction: "Q", output: "A", "other": 1}) == RowText("Q", "", ("A",), None)


@pytest.mark.parametrize(("input", "category"), [("input", "category"), ("context", "topic")])
def test_optional_columns_when_named_as_usual_then_are_recognised(input: str, category: str) -> None:
    row = {"instruction": "Q", input: "I", "output": "A", category: "C"}
    assert read(row) == RowText("Q", "I", ("A",), "C")


def test_columns_when_several_names_fit_then_the_first_of_the_list_counts() -> None:
    row = {"prompt": "filled template", "instruction": "Q", "response": "second", "output": "A", "text": "all"}
    assert read(row) == RowText("Q", "", ("A",), None)


def test_columns_when_named_in_the_configuration_then_win_over_the_usual_names() -> None:
    row = {"instruction": "no", "output": "no", "task": "Q", "solution": "A", "data": "I", "kind": "C"}
    chosen = {"instruction": "task", "output": "solution", "input": "data", "category": "kind"}
    assert read(row, **chosen) == RowText("Q", "I", ("A",), "C")


def test_input_when_its_usual_column_is_the_instruction_then_is_not_used_twice() -> None:
    assert read({"input": "Q", "output": "A"}, instruction="input") == RowText("Q", "", ("A",), None)


def test_missing_column_when_nothing_fits_then_error_names_columns_and_the_override() -> None:
    with pytest.raises(DataError) as caught:
        read({"question_text": "Q", "output": "A"})
    message = str(caught.value)
    assert "no column for the instruction in data/rows.jsonl:17" in message
    assert "'question_text', 'output'" in message
    assert "dataset.fields.instruction=question_text" in message


def test_missing_column_when_a_row_has_hundreds_then_error_stays_short() -> None:
    with pytest.raises(DataError, match="and 481 more") as caught:
        read({"x" * 10_000: "Q", **{f"column {i}": "A" for i in range(500)}})
    assert len(str(caught.value)) < 1_500


def test_missing_column_when_the_output_is_absent_then_error_names_the_override() -> None:
    with pytest.raises(DataError, match=r"dataset\.fields\.output=reply"):
        read({"instruction": "Q", "input": "I", "reply": "A"})


@pytest.mark.parametrize("role", ["instruction", "output"])
def test_missing_column_when_named_in_the_configuration_then_is_an_error(role: str) -> None:
    with pytest.raises(DataError, match=rf"no column 'quest' in .* dataset\.fields\.{role}=question"):
        read({"instruction": "Q", "question": "Q", "output": "A"}, **{role: "quest"})


def test_optional_column_when_named_and_in_no_row_then_is_an_error() -> None:
    reader = FieldReader(FieldsConfig(instruction=None, input="contxt", output=None, category=None))
    reader.read(SourceRow("r:1", "r:1", {"instruction": "Q", "context": "I", "output": "A"}))
    with pytest.raises(DataError, match=r"no column 'contxt' in rows\.jsonl .* dataset\.fields\.input=context"):
        reader.check_optional("rows.jsonl")


def test_optional_column_when_named_and_in_some_row_then_is_accepted() -> None:
    reader = FieldReader(FieldsConfig(instruction=None, input="extra", output=None, category=None))
    first = reader.read(SourceRow("r:1", "r:1", {"instruction": "Q", "output": "A"}))
    second = reader.read(SourceRow("r:2", "r:2", {"instruction": "Q", "extra": "I", "output": "A"}))
    reader.check_optional("rows.jsonl")
    assert (first, second) == (RowText("Q", "", ("A",), None), RowText("Q", "I", ("A",), None))


@pytest.mark.parametrize("value", [17, 1.5, True, ["Q"], {"text": "Q"}])
@pytest.mark.parametrize("column", ["instruction", "input"])
def test_text_when_of_another_type_then_error_names_column_and_line(column: str, value: Any) -> None:
    row = {"instruction": "Q", "input": "I", "output": "A", column: value}
    with pytest.raises(DataError, match=rf"column '{column}' holds .* in data/rows\.jsonl:17 — text is expected"):
        read(row)


@pytest.mark.parametrize("value", [17, {"text": "A"}, ["A", 17], [["A"]]])
def test_output_when_of_another_type_then_is_an_error(value: Any) -> None:
    with pytest.raises(DataError, match="column 'output' holds"):
        read({"instruction": "Q", "output": value})


def test_output_when_a_list_then_holds_all_references_but_blank_ones() -> None:
    assert read({"instruction": "Q", "output": ["", "A", None, "B", " "]}) == RowText("Q", "", ("A", "B"), None)


@pytest.mark.parametrize("value", ["", " \n", None, [], [""], [None]])
def test_row_when_its_response_is_empty_then_is_dropped(value: Any) -> None:
    assert read({"instruction": "Q", "output": value}) == EMPTY_RESPONSE


@pytest.mark.parametrize("value", ["", " \n", None])
def test_row_when_its_prompt_is_empty_then_is_dropped(value: Any) -> None:
    assert read({"instruction": value, "input": value, "output": "A"}) == EMPTY_PROMPT
    assert read({"instruction": value, "output": "A"}) == EMPTY_PROMPT


def test_texts_when_they_have_outer_white_space_then_keep_it() -> None:
    assert read({"instruction": " Q\n", "input": "\tI", "output": "A "}) == RowText(" Q\n", "\tI", ("A ",), None)


@pytest.mark.parametrize("column", ["instruction", "input", "output", "category"])
def test_row_when_a_text_has_a_lone_surrogate_then_is_dropped(column: str) -> None:
    row = {"instruction": "Q", "input": "I", "output": "A", "category": "C", column: "a\ud83d"}
    assert read(row) == LONE_SURROGATE


@pytest.mark.parametrize(("value", "category"), [(3, "3"), (["a"], None), (None, None), ("C", "C")])
def test_category_when_no_text_then_never_stops_the_run(value: Any, category: str | None) -> None:
    assert read({"instruction": "Q", "output": "A", "category": value}) == RowText("Q", "", ("A",), category)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_conversation_when_one_user_and_one_assistant_turn_then_is_a_row() -> None:
    assert read({"messages": [turn("user", "Q"), turn("assistant", "A")]}) == RowText("Q", "", ("A",), None)


def test_conversation_when_it_has_a_system_turn_then_prepends_it_to_the_instruction() -> None:
    row = {"messages": [turn("system", "Be brief."), turn("user", "Q"), turn("assistant", "A")], "topic": "C"}
    assert read(row) == RowText("Be brief.\n\nQ", "", ("A",), "C")


def test_conversation_when_in_the_share_gpt_form_then_is_a_row() -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert read(row) == RowText("Q", "", ("A",), None)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user", "assistant", "user", "assistant"], MULTI_TURN),
        (["user", "user", "assistant"], MULTI_TURN),
        (["user"], NOT_A_PAIR),
        (["assistant", "user"], NOT_A_PAIR),
        (["user", "system", "assistant"], NOT_A_PAIR),
        (["user", "assistant", "tool"], NOT_A_PAIR),
        ([], NOT_A_PAIR),
    ],
)
def test_conversation_when_not_one_turn_each_then_is_dropped(roles: list[str], reason: str) -> None:
    assert read({"messages": [turn(role, "text") for role in roles]}) == reason


@pytest.mark.parametrize(("question", "answer", "reason"), [("", "A", EMPTY_PROMPT), ("Q", None, EMPTY_RESPONSE)])
def test_conversation_when_a_turn_is_empty_then_is_dropped(question: str, answer: Any, reason: str) -> None:
    turns = [turn("system", "Be brief."), turn("user", question), turn("assistant", answer)]
    assert read({"messages": turns}) == reason


def test_conversation_when_null_then_is_dropped() -> None:
    assert read({"messages": None}) == NOT_A_PAIR


@pytest.mark.parametrize("messages", ["text", ["text"], [turn("user", ["part"])]])
def test_conversation_when_of_another_shape_then_is_an_error(messages: Any) -> None:
    with pytest.raises(DataError, match="column 'messages' holds"):
        read({"messages": messages})


def test_conversation_when_instruction_and_output_are_there_too_then_is_not_used() -> None:
    row = {"prompt": "Q", "completion": "A", "messages": [turn("user", "other")]}
    assert read(row) == RowText("Q", "", ("A",), None)


def test_conversation_when_only_a_prompt_stands_beside_it_then_is_used() -> None:
    row = {"prompt": "other", "messages": [turn("user", "Q"), turn("assistant", "A")]}
    assert read(row) == RowText("Q", "", ("A",), None)

"""Plain text and conversations through every command, on the tiny recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pocl_cli.errors import ConfigError
from pocl_cli.models.toy_tokenizer import build_toy_tokenizer
from pocl_cli.steps import distill, evaluate, partition, score
from pocl_cli.steps.chain import Chain

from ..support.folders import memory_folder
from ..support.recipe import compose, distilled, recipe, write_inputs

TEXT = ("the red cat sees a blue dog", "a green bird", "one two three four five six seven eight nine ten")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with memory_folder() as folder:
        write_inputs(folder / "inputs")
        (folder / "inputs/corpus.txt").write_text("".join(f"{text} {n}\n\n" for n in range(8) for text in TEXT))
        rows = (json.loads(line) for line in (folder / "inputs/rows.jsonl").read_text().splitlines())
        with open(folder / "inputs/chats.jsonl", "w") as chats:
            for row in rows:
                turns = [("user", row["instruction"]), ("assistant", row["output"])]
                messages = [{"role": role, "content": content} for role, content in turns]
                chats.write(json.dumps({"messages": messages}) + "\n")
        tokenizer = build_toy_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / "inputs/chatty")
        yield folder


def text_recipe(place: Path, *changes: str) -> list[str]:
    inputs = place / "inputs"
    corpus = f"path: {inputs}/corpus.txt, format: text, max_tokens: 24"
    return recipe(
        inputs,
        place / "outputs",
        f"dataset.path={inputs}/corpus.txt",
        "dataset.format=text",
        "dataset.max_tokens=24",
        "difficulty=cross_entropy",
        f"evaluation.datasets=[{{name: corpus, {corpus}}}, {{name: rows, path: {inputs}/rows.jsonl, max_tokens: 60, "
        "max_prompt_tokens: 48}]",
        "evaluation.seeds=[1]",
        "evaluation.decoding.max_new_tokens=4",
        *changes,
    )


def test_text_when_the_commands_run_then_rows_are_scored_trained_on_and_evaluated_without_answers(place: Path) -> None:
    words = text_recipe(place)
    scored = score.run(compose(words, "score")).artifact.path
    scores = pq.read_table(scored / "scores.parquet").to_pylist()
    assert any("." in row["id"] for row in scores)
    assert all(row["num_prompt_tokens"] == 1 and row["cross_entropy"] > 0 for row in scores)
    assert {(row["generation"], row["rouge_l"], row["cross_entropy_alone"]) for row in scores} == {(None, None, None)}
    assert any(row["instruction"].startswith("the red cat") for row in scores)

    subsets = pq.read_table(partition.run(compose(words, "partition")).artifact.path / "partition.parquet")
    assert sorted(subsets["id"].to_pylist()) == sorted(row["id"] for row in scores)

    student = distilled(compose(words))
    lines = [json.loads(line) for line in (student.path / "metrics.jsonl").read_text().splitlines()]
    dev = [line for line in lines if "loss" not in line]
    assert dev[-1]["dev_cross_entropy"] < dev[0]["dev_cross_entropy"]
    assert all(line["dev_perplexity"] == math.exp(line["dev_cross_entropy"]) for line in dev)
    assert not any("dev_rouge_l" in line for line in dev)
    best = min(line["dev_cross_entropy"] for line in dev if line["stage"] == 1)
    assert student.manifest.extra["dev_cross_entropy"] == best

    evaluated = evaluate.run(compose(words, "evaluate")).artifact.path
    metrics = json.loads((evaluated / "metrics.json").read_text())["datasets"]
    assert sorted(metrics["corpus"]) == ["cross_entropy", "perplexity"]
    assert metrics["corpus"]["perplexity"]["mean"] == math.exp(metrics["corpus"]["cross_entropy"]["mean"])
    assert "rouge_l" in metrics["rows"]
    predictions = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
    assert {line["dataset"] for line in predictions} == {"rows"}


def test_text_when_planned_then_the_pieces_of_documents_are_counted(place: Path, capsys) -> None:
    run = compose(text_recipe(place, "plan.enabled=true", "upstream=require"))
    assert distill.run(run) is None
    scored = score.run(compose(text_recipe(place), "score")).artifact.path
    num_rows = pq.read_table(scored / "scores.parquet").num_rows
    last = [line.split() for line in capsys.readouterr().err.splitlines() if line[:6].strip().isdigit()][-1]
    assert int(last[1]) >= num_rows


@pytest.mark.parametrize("difficulty", ["rrf", "rouge_l", "ifd"])
def test_text_when_the_difficulty_reads_answers_then_the_error_names_those_that_do_not(
    place: Path, difficulty: str
) -> None:
    with pytest.raises(ConfigError, match=r"difficulty=cross_entropy or difficulty=length"):
        compose(text_recipe(place, f"difficulty={difficulty}"))


def test_text_when_a_stage_would_end_by_answers_then_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"convergence\.metric=dev_cross_entropy"):
        compose(text_recipe(place, "curriculum.convergence.metric=dev_rouge_l"))


@pytest.mark.parametrize("step", ["evaluate", "compare"])
def test_text_when_answers_are_asked_for_then_is_refused(place: Path, step: str) -> None:
    changes = ["evaluation.predictions=answers.jsonl"] if step == "evaluate" else []
    corpus = f"evaluation.datasets=[{{path: {place}/inputs/corpus.txt, format: text}}]"
    with pytest.raises(ConfigError, match=r"plain text \(format=text\) has none"):
        compose(text_recipe(place, corpus, *changes), step)


def test_messages_when_the_commands_run_then_the_template_renders_prompts_and_decides_the_student(place: Path) -> None:
    chatty = place / "inputs/chatty"
    words = recipe(
        place / "inputs",
        place / "outputs",
        f"dataset.path={place}/inputs/chats.jsonl",
        "dataset.format=messages",
        f"student.tokenizer={chatty}",
        f"evaluation.datasets=[{{name: chats, path: {place}/inputs/chats.jsonl, format: messages, max_tokens: 64, "
        "max_prompt_tokens: 48}]",
        "evaluation.seeds=[1]",
        "evaluation.decoding.max_new_tokens=4",
    )
    student = distilled(compose(words))
    assert "dev_rouge_l" in student.manifest.extra
    metrics = json.loads((evaluate.run(compose(words, "evaluate")).artifact.path / "metrics.json").read_text())
    assert "rouge_l" in metrics["datasets"]["chats"]
    other = TEMPLATE.replace(": ", "> ")
    (chatty / "chat_template.jinja").write_text(other)
    assert Chain(compose(words)).student_key.id != student.id


def test_messages_when_the_tokenizer_has_no_template_then_is_a_configuration_error(place: Path) -> None:
    words = recipe(
        place / "inputs", place / "outputs", f"dataset.path={place}/inputs/chats.jsonl", "dataset.format=messages"
    )
    with pytest.raises(ConfigError, match="no chat template"):
        distill.run(compose(words))


def test_pairs_when_their_columns_are_named_then_documents_are_instructions_and_summaries_answers(
    place: Path,
) -> None:
    path = place / "inputs/pairs.jsonl"
    path.write_text("".join(json.dumps({"document": text, "summary": text.split()[-1]}) + "\n" for text in TEXT * 2))
    words = recipe(
        place / "inputs",
        place / "outputs",
        f"dataset.path={path}",
        "dataset.fields.instruction=document",
        "dataset.fields.output=summary",
        "dataset.dev_size=0",
        "curriculum.stages=2",
    )
    student = distilled(compose(words))
    assert pq.read_table(student.path / "consumed.parquet").num_rows > 0

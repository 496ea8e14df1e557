from __future__ import annotations

import logging
import time

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from pocl_cli.errors import ConfigError
from pocl_cli.models.vocabulary import align_vocabularies, compare_tokenizers, num_real_tokens

WORDS = ["<eos>", "<unk>", "red", "green", "blue"]


def make(words=WORDS, eos="<eos>", added=()):
    vocabulary = words if isinstance(words, dict) else {word: i for i, word in enumerate(words)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), eos_token=eos, unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


def test_comparison_of_equal_tokenizers_gives_the_number_of_shared_tokens():
    assert compare_tokenizers(make(), make()) == 5


def test_comparison_of_equal_tokenizers_with_an_added_token_counts_it():
    assert compare_tokenizers(make(added=["<pad>"]), make(added=["<pad>"])) == 6


def test_comparison_of_different_tokenizers_names_the_first_token_that_differs():
    other = [*WORDS[:3], "blue", "green"]

    with pytest.raises(ConfigError, match="id 3 is 'green' for the teacher, 'blue' for the student") as caught:
        compare_tokenizers(make(), make(other))

    assert caught.value.exit_code == 2


def test_comparison_where_one_tokenizer_is_longer_names_its_first_further_token():
    with pytest.raises(ConfigError, match="id 5 is no token for the teacher, '<pad>' for the student"):
        compare_tokenizers(make(), make(added=["<pad>"]))


def test_comparison_of_added_tokens_that_differ_is_refused():
    with pytest.raises(ConfigError, match="id 5 is '<a>' for the teacher, '<b>' for the student"):
        compare_tokenizers(make(added=["<a>"]), make(added=["<b>"]))


def test_comparison_of_equal_tokens_with_another_end_token_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="pocl"):
        count = compare_tokenizers(make(), make(eos="red"))

    assert count == 5
    assert "'<eos>'" in caplog.text
    assert "'red'" in caplog.text


def test_number_of_real_tokens_where_ids_have_gaps_covers_the_largest_id():
    assert num_real_tokens(make({"<eos>": 0, "<unk>": 1, "red": 9})) == 10


def test_alignment_of_different_widths_cuts_both_to_the_tokenizer_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="pocl"):
        alignment = align_vocabularies(
            student_tokenizer=make(), student_width=8, teacher_tokenizer=make(), teacher_width=16
        )

    assert alignment.num_real_tokens == 5
    assert "3 of the student's 8" in caplog.text
    assert "11 of the teacher's 16" in caplog.text


def test_alignment_of_equal_widths_logs_nothing(caplog):
    with caplog.at_level(logging.INFO, logger="pocl"):
        align_vocabularies(student_tokenizer=make(), student_width=8, teacher_tokenizer=make(), teacher_width=8)

    assert not caplog.records


def test_alignment_without_a_teacher_leaves_out_the_students_padding_rows():
    alignment = align_vocabularies(student_tokenizer=make(), student_width=8)

    assert (alignment.num_real_tokens, alignment.teacher_width) == (5, None)


@pytest.mark.parametrize(("student", "teacher", "role"), [(4, 8, "student"), (8, 4, "teacher")])
def test_alignment_with_fewer_rows_than_tokens_is_refused(student, teacher, role):
    with pytest.raises(ConfigError, match=f"{role}.path.*ids up to 4, the output layer 4 rows"):
        align_vocabularies(
            student_tokenizer=make(), student_width=student, teacher_tokenizer=make(), teacher_width=teacher
        )


def test_comparison_of_150_thousand_tokens_that_differ_in_the_last_is_quick():
    words = [*WORDS, *(f"word{i}" for i in range(150_000))]
    teacher, student = make(words), make([*words[:-1], "other"])
    started = time.perf_counter()

    with pytest.raises(ConfigError, match="id 150004"):
        compare_tokenizers(teacher, student)

    assert time.perf_counter() - started < 5

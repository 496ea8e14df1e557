"""Which tokens the two models share. Tokenizers are compared, not widths: an output layer may have padding rows."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pocl_cli.errors import ConfigError
from pocl_cli.log import get_logger


@dataclass(frozen=True, slots=True)
class VocabularyAlignment:
    """How many logits of each model belong to real tokens.

    Attributes:
        num_real_tokens: logits of both models are cut to this many before the softmax.
        student_width: rows of the student's output layer, padding rows included.
        teacher_width: rows of the teacher's; None where there is no teacher.
    """

    num_real_tokens: int
    student_width: int
    teacher_width: int | None


def num_real_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id, added tokens included; ids that the tokenizer leaves out count."""
    # len(tokenizer) is smaller than that where ids have gaps, and would cut real tokens off.
    return max(tokenizer.get_vocab().values()) + 1


def compare_tokenizers(teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that both share, where every id means the same text; added and special tokens count.

    Warns where both know the same tokens but end a response with different ones.

    Raises:
        ConfigError: an id means different texts; the first one is named.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if teacher != student:
        raise _difference(teacher, student)
    if teacher_tokenizer.eos_token != student_tokenizer.eos_token:
        get_logger().warning(
            "the teacher ends a response with %r, the student with %r: the student learns its own end from the rows, "
            "the distillation term pulls towards the teacher's",
            teacher_tokenizer.eos_token,
            student_tokenizer.eos_token,
        )
    return max(student.values()) + 1


def check_width(role: str, width: int, count: int) -> None:
    """Raises ConfigError where a model's output layer has fewer rows (`width`) than there are tokens (`count`)."""
    if width < count:
        raise ConfigError(
            f"the {role}'s tokenizer does not fit its model",
            where=f"{role}.path",
            why=f"the tokenizer has ids up to {count - 1}, the output layer {width} rows",
            fix="give the model the tokenizer it was trained with, or resize its embeddings",
        )


def align_vocabularies(
    *,
    student_tokenizer: PreTrainedTokenizerBase,
    student_width: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_width: int | None = None,
) -> VocabularyAlignment:
    """Cuts both models' logits to the real tokens, and says so in the log where the widths differ.

    Args:
        student_tokenizer: the student's.
        student_width: rows of the student's output layer.
        teacher_tokenizer: the teacher's, or None where there is no teacher.
        teacher_width: rows of the teacher's output layer, or None where there is no teacher.

    Raises:
        ConfigError: the tokenizers differ, or an output layer has fewer rows than its tokenizer has tokens.
    """
    assert (teacher_tokenizer is None) == (teacher_width is None), "a teacher has a tokenizer and a width"
    if teacher_tokenizer is None:
        count = num_real_tokens(student_tokenizer)
    else:
        count = compare_tokenizers(teacher_tokenizer, student_tokenizer)
    for role, width in (("student", student_width), ("teacher", teacher_width)):
        if width is not None:
            check_width(role, width, count)
    if teacher_width is not None and teacher_width != student_width:
        get_logger().info(
            "vocabulary: %d shared tokens; padding rows left out: %d of the student's %d, %d of the teacher's %d",
            count,
            student_width - count,
            student_width,
            teacher_width - count,
            teacher_width,
        )
    return VocabularyAlignment(count, student_width, teacher_width)


def _difference(teacher: dict[str, int], student: dict[str, int]) -> ConfigError:
    token_id = min(token_id for _, token_id in teacher.items() ^ student.items())
    return ConfigError(
        f"teacher and student have different tokenizers: token id {token_id} is "
        f"{_text_of(token_id, teacher)} for the teacher, {_text_of(token_id, student)} for the student",
        where="teacher.path and student.path",
        why=f"distillation compares probabilities id by id ({len(teacher)} and {len(student)} tokens)",
        fix="choose a teacher and a student with the same tokenizer",
    )


def _text_of(token_id: int, vocabulary: dict[str, int]) -> str:
    texts = [text for text, known_id in vocabulary.items() if known_id == token_id]
    return " and ".join(map(repr, texts)) or "no token"

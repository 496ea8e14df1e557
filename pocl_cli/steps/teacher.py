"""The teacher of a chain as scoring and training ask it: online, or from its stored hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from pocl_cli.artifacts.disk import check_free_disk
from pocl_cli.models.head import split_model
from pocl_cli.models.load import load_model, read_config
from pocl_cli.models.teacher import OnlineTeacher, Teacher
from pocl_cli.steps.weights import loadable
from pocl_cli.training.stored_teacher import StoredTeacher, open_teacher
from pocl_cli.training.teacher_signals import TeacherSignals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocl_cli.artifacts.manifest import Artifact
    from pocl_cli.artifacts.work import Work
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.source import ModelSource
    from pocl_cli.steps.chain import Chain
    from pocl_cli.training.shards import Rows


def teacher_of(chain: Chain, rows: Rows, hardware: Hardware, *, stored: bool) -> Teacher:
    """The teacher for `rows`: all training rows of the chain, or all stored answers to them.

    `stored`: read from its stored hidden states, to which missing ones are added; else it runs in every step.

    Raises:
        ArtifactError: a shard of its stored hidden states is damaged, or the model is.
        ResourceError: the hidden states that are missing would not fit on the disk.
    """
    source = chain.teacher
    assert source is not None, "a chain without a teacher asks none"

    def load() -> OnlineTeacher:
        loaded = load_model(loadable(chain, source), device=hardware.device, dtype_override=None, dropout=None)
        return OnlineTeacher(split_model(loaded.model))

    if not stored:
        return load()
    signals = _signals(chain, rows)
    _refuse_full_disk(chain, _missing_bytes(chain, signals))
    return open_teacher(signals, load, hardware=hardware)


def check_room(chains: Sequence[Chain], rows: Rows) -> None:
    """Raises ResourceError where what is missing of the hidden states of several teachers does not fit on the disk.

    Args:
        chains: of different teachers; those that store nothing take nothing.
        rows: which they are asked for.
    """
    storing = [chain for chain in chains if chain.stores_teacher]
    _refuse_full_disk(chains[0], sum(_missing_bytes(chain, _signals(chain, rows)) for chain in storing))


def _missing_bytes(chain: Chain, signals: TeacherSignals) -> int:
    sizes = stored_sizes(chain.model("teacher"))
    return signals.missing_bytes(token_bytes=sizes.token, head_bytes=sizes.head)


def _refuse_full_disk(chain: Chain, num_bytes: int) -> None:
    check_free_disk(
        chain.store.outputs,
        num_bytes,
        "what is not stored yet of the teacher: its output head, and its hidden states on the response tokens",
        otherwise="set teacher.store=false: the teacher then runs in every step",
    )


def teacher_source(teacher: Teacher | None) -> str | None:
    """What a checkpoint notes of the teacher: its two sources give other bytes, as they pad rows otherwise."""
    if teacher is None:
        return None
    return "stored" if isinstance(teacher, StoredTeacher) else "online"


class StoredSizes(NamedTuple):
    """Bytes of one response token's hidden state, and of the output head."""

    token: int
    head: int


def stored_sizes(source: ModelSource) -> StoredSizes:
    """What storing a teacher takes, as far as its configuration tells."""
    config = read_config(source)
    text = config.get_text_config(decoder=True)
    # OPT 350m projects its hidden states to another width before the output layer.
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    dtype = str(config.dtype or "float32").removeprefix("torch.") if source.dtype == "auto" else source.dtype
    token = int(width * getattr(torch, dtype).itemsize)
    return StoredSizes(token, int(text.vocab_size) * token)


def _signals(chain: Chain, rows: Rows) -> TeacherSignals:
    source = chain.teacher
    made_here = source.identity.get("student") if source is not None else None

    def commit(work: Work) -> Artifact:
        return work.commit(
            config=chain.run.resolved,
            inputs={"teacher": str(made_here)} if made_here else {},
            command=chain.run.command,
            seed=None,
        )

    return TeacherSignals(chain.store, rows, head_key=chain.head_key, shard_key=chain.shard_key, commit=commit)

"""Stored answers: what a model writes to each training row, once, for the KD methods that train on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pocl_cli.artifacts import durable
from pocl_cli.data.token_ids import eos_id
from pocl_cli.errors import ArtifactError
from pocl_cli.log import get_logger, progress
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.generate import Generated, generate
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, load_model, load_tokenizer
from pocl_cli.models.sampling import row_seed
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.processes.job import FOLDER, LOCK
from pocl_cli.records import TokenisedRow
from pocl_cli.schema import DecodingConfig, PoclConfig
from pocl_cli.steps import checks
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.parts import do_part
from pocl_cli.steps.result import obtain
from pocl_cli.steps.rows import training_rows
from pocl_cli.steps.shard_files import SHARDS, ShardFiles
from pocl_cli.steps.weights import loadable
from pocl_cli.training.answered_rows import AnsweredRows
from pocl_cli.training.measure import records_named
from pocl_cli.training.parallel import Processes
from pocl_cli.training.shards import in_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from pocl_cli.artifacts.manifest import Artifact
    from pocl_cli.data.tokenise import TokenisedDataset

# `token_ids` without EOS; `ended` is false where a length limit cut the answer; `text` is for people.
ANSWERS = pa.schema(
    [("id", pa.string()), ("token_ids", pa.list_(pa.int32())), ("ended", pa.bool_()), ("text", pa.string())]
)
_FILE = "answers.parquet"


def obtain_answers(chain: Chain, who: str) -> Artifact:
    """The answers of `student` or `teacher`; with `upstream=auto` made first, and nothing is scored for them.

    Raises:
        ArtifactError: they do not exist, and `upstream=require`.
    """
    key = chain.answers_key(who)
    if chain.config.upstream == "auto" and chain.store.find(key) is None:
        get_logger().info("answers %s do not exist yet: making them first", key.id)
        return make_answers(chain, who)
    return obtain(chain.run, "score", key, chain.store)


def make_answers(chain: Chain, who: str) -> Artifact:
    """Found, or made now. Raises as the other steps do."""
    key = chain.answers_key(who)
    found = chain.store.find(key)
    if found is not None:
        get_logger().info("the %s has answered: %s", who, found.path)
        return found
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return work.finished
        checks.refuse_early(checks.of_answering(chain, who))
        figures = do_part(f"answers_of_{who}", chain, work)
        made_here = chain.model(who).identity.get("student")
        artifact = work.commit(
            config=chain.run.resolved,
            inputs={who: str(made_here)} if made_here else {},
            command=chain.run.command,
            seed=chain.config.kd_method.decoding.seed,
            extra=figures,
            exclude=[SHARDS, FOLDER, LOCK],
        )
    get_logger().info("the %s answered %s: %s", who, shown(figures), artifact.path)
    return artifact


def read_answers(chain: Chain, who: str, gold: TokenisedDataset, tokenizer: PreTrainedTokenizerBase) -> AnsweredRows:
    """The rows of `gold` with the stored answers as their responses; the files are hashed again.

    Raises:
        ArtifactError: the artifact is missing or damaged, or holds other rows.
    """
    artifact = obtain_answers(chain, who)
    chain.store.verify(artifact)
    table = pq.read_table(artifact.path / _FILE, columns=["id", "token_ids", "ended"])
    if tuple(table["id"].to_pylist()) != gold.ids:
        raise ArtifactError(
            f"the answers are to other rows than those of the data set ({len(table)} and {len(gold)})",
            where=str(artifact.path),
            fix=f"delete them and run: {chain.run.command_for('score')}",
        )
    get_logger().info("the responses are answers of the %s to %s", who, shown(artifact.manifest.extra))
    return AnsweredRows(who, gold, table["token_ids"], table["ended"], eos_id=eos_id(tokenizer))


def shown(figures: dict[str, Any]) -> str:
    """The figures of an artifact, for a log."""
    rows, ended, tokens = figures["num_rows"], figures["ended_with_eos"], figures["tokens"]
    return (
        f"{rows} rows; {ended:.1f} % ended by themselves, {figures['empty']} are empty, {tokens:.1f} tokens on average"
    )


# ── inside each process ───────────────────────────────────────────────────────────────────────────────────────────────


def answers_of_student(chain: Chain, folder: Path, processes: Processes) -> dict[str, Any]:
    """See `_answered`."""
    return _answered(chain, "student", folder, processes)


def answers_of_teacher(chain: Chain, folder: Path, processes: Processes) -> dict[str, Any]:
    """See `_answered`."""
    return _answered(chain, "teacher", folder, processes)


def _answered(chain: Chain, who: str, folder: Path, processes: Processes) -> dict[str, Any]:
    """Leaves `answers.parquet` in `folder`, whoever answered which shard; the figures.

    A shard is written when it is whole; those of an interrupted run are not answered again.
    """
    hardware = set_up_hardware(chain.config.hardware, rank=processes.local_rank)
    rows = training_rows(chain.config, load_tokenizer(chain.student)).train
    shards, files = in_shards(rows), ShardFiles(folder / SHARDS, "parquet")
    missing = files.missing(shards, processes)
    if missing:
        num_rows = sum(len(ids) for _, ids in missing)
        with (
            memory_errors_explained(hardware, f"answering with the {who}"),
            progress(f"{chain.config.dataset.name}: answers of the {who}", num_rows) as advance,
        ):
            source = loadable(chain, chain.model(who))
            loaded = load_model(source, device=hardware.device, dtype_override=None, dropout=None)
            for path, ids in missing:
                shard = [rows.row(row_id) for row_id in ids]
                durable.write_parquet(path, _table(ids, _answer(chain.config, loaded, shard, hardware), loaded))
                advance(len(ids))
    if not processes.is_first:
        return {}
    table = pa.concat_tables([pq.read_table(path) for path in files.all(len(shards))])
    order = pc.index_in(pa.array(rows.ids, pa.string()), value_set=table["id"].combine_chunks())
    # In one chunk: the file's bytes must not depend on how the shards were read.
    table = table.take(order).combine_chunks()
    durable.write_parquet(folder / _FILE, table)
    return _figures(table)


def _answer(
    config: PoclConfig, loaded: LoadedModel, rows: Sequence[TokenisedRow], hardware: Hardware
) -> list[Generated]:
    decoding = config.kd_method.decoding
    # A row with its answer and EOS is as long as a row may be: training reads it.
    limit = config.dataset.max_tokens
    with hardware.autocast(), records_named(rows):
        answers = generate(
            split_model(loaded.model),
            [row.prompt_ids for row in rows],
            seeds=[[row_seed(decoding.seed, row.id, "answers")] for row in rows],
            decoding=DecodingConfig(
                sampling_temperature=decoding.sampling_temperature,
                top_p=decoding.top_p,
                top_k=0,
                no_repeat_ngram_size=decoding.no_repeat_ngram_size,
                max_new_tokens=decoding.max_new_tokens,
            ),
            eos_token_ids=loaded.eos_token_ids,
            pad_token_id=loaded.pad_token_id,
            max_tokens_per_batch=hardware.max_tokens_per_micro_batch,
            context_length=limit if loaded.context_length is None else min(limit, loaded.context_length),
            vocabulary_size=num_real_tokens(loaded.tokenizer),
        )
    return [one for (one,) in answers]


def _table(ids: Sequence[str], answers: Sequence[Generated], loaded: LoadedModel) -> pa.Table:
    token_ids = [list(one.token_ids) for one in answers]
    columns: dict[str, list[Any]] = {
        "id": list(ids),
        "token_ids": token_ids,
        "ended": [one.ended for one in answers],
        "text": [loaded.tokenizer.decode(one, skip_special_tokens=True) for one in token_ids],
    }
    return pa.table(columns, schema=ANSWERS)


def _figures(table: pa.Table) -> dict[str, Any]:
    lengths = pc.list_value_length(table["token_ids"]).to_pylist()
    ended = table["ended"].to_pylist()
    return {
        "num_rows": len(lengths),
        "ended_with_eos": 100 * sum(ended) / len(ended),
        "empty": lengths.count(0),
        "tokens": math.fsum(lengths) / len(lengths),
    }

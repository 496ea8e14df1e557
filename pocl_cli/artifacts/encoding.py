"""Plain values and tensors as bytes: equal values give equal bytes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pocl_cli.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

# Lone surrogates cannot be encoded; the others end a line for str.splitlines and would tear a JSON line apart.
_UNSAFE_IN_LINES = re.compile("[\ud800-\udfff\x7f\x85\u2028\u2029]")

SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def json_text(
    value: Any, *, where: str | None = None, indent: int | None = None, separators: tuple[str, str] | None = None
) -> str:
    """`value` as JSON on one line (or indented), keys sorted, lone surrogates and Unicode line ends escaped.

    Raises:
        NonFiniteError: a number in `value` is not finite; names its dotted key and `where`.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators
        )
    except ValueError as error:
        key = _non_finite_key(value)
        if key is None:
            raise
        raise NonFiniteError(
            f"a number that is not finite at {key or 'the top level'}",
            where=where,
            why="JSON files hold finite numbers only",
            fix="look for the first non-finite loss or score in the log",
        ) from error
    return _UNSAFE_IN_LINES.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def _non_finite_key(value: Any, key: str = "") -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return key
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    for name, child in children:
        found = _non_finite_key(child, f"{key}.{name}" if key else str(name))
        if found is not None:
            return found
    return None


def safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """The order in which the tensors' bytes follow, and the bytes that come before them (length and JSON header)."""
    assert sys.byteorder == "little", "safetensors are little-endian"
    # Wide elements first, as the library does: each tensor then starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json_text(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return order, len(encoded).to_bytes(8, "little") + encoded

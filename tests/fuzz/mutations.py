"""Hostile values, and real files with some of what they hold replaced by them."""

from __future__ import annotations

import copy
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

ESCAPES = "\x1b]0;owned\x07\x1b[2J[/bold][link=x]\u202e\ud800:smile:"
TEXTS = [
    "", "none", "nan", "\x00", ESCAPES, "../../etc/passwd", "a" * 3000, "1e999", "é\n--- ", "-1",
    "timm:vit_gigantic_patch14_224", "torchvision:vit_h_14", "folder:/", "folder:/dev", "hf:/dev",
    "/dev/zero", "synthetic", "resnet8", "search", "complete", "${HOME}", "x.y:z", "__class__",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 10**6, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300,
    5e-324, 1e38, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
_PLAIN = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(),
    st.floats(), st.text(max_size=12),
)  # fmt: skip


class Data(bytes):
    """A file's content, of which a failure shows the beginning."""

    def __repr__(self) -> str:
        return f"{bytes(self[:300])!r}, {len(self)} bytes"


def _deep(count: int) -> Any:
    found: Any = 1
    for _ in range(count):
        found = [found]
    return found


VALUES = st.one_of(
    _PLAIN,
    st.lists(_PLAIN, max_size=5),
    st.dictionaries(st.one_of(st.sampled_from(TEXTS), st.text(max_size=5)), _PLAIN, max_size=3),
    st.sampled_from([10, 100]).map(_deep),
)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in nested lists and mappings, the whole first."""
    inner = tree.items() if isinstance(tree, dict) else ()
    found = [path]
    for key, value in enumerate(tree) if isinstance(tree, list) else inner:
        found += _places(value, (*path, key))
    return found


@st.composite
def changed_tree(draw: Any, tree: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """Nested plain values, of which one to three were replaced, removed, swapped or wrapped."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(tree)[1:]
        if not places:
            return draw(values)
        *way, last = draw(st.sampled_from(places))
        parent = tree
        for key in way:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "copy", "wrap", "add"]))
        if how == "replace":
            parent[last] = draw(values)
        elif how == "remove":
            del parent[last]
        elif how == "copy":
            there = tree
            for key in draw(st.sampled_from(places)):
                there = there[key]
            parent[last] = copy.deepcopy(there)
        elif how == "wrap":
            parent[last] = [parent[last]]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(TEXTS))] = draw(values)
        else:
            parent.append(draw(values))
    return tree


@st.composite
def changed_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes of which some were flipped, cut out, doubled or put in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(found)))
        end = min(len(found), start + draw(st.sampled_from([1, 1, 8, 100, 10**9])))
        how = draw(st.sampled_from(["flip", "cut", "double", "put"]))
        if how == "flip" and start < len(found):
            found[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del found[start:end]
        elif how == "double":
            found[start:start] = found[start:end]
        else:
            found[start:start] = draw(st.one_of(st.binary(max_size=8), st.just(b"[" * 10**5)))
    return bytes(found)


def _to_json(tree: Any, before: bytes) -> bytes:
    return json.dumps(tree).encode()


def _to_lines(rows: Any, before: bytes) -> bytes:
    lines = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in lines).encode()


def _to_yaml(tree: Any, before: bytes) -> bytes:
    return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


def _read_parquet(data: bytes) -> Any:
    return pq.read_table(io.BytesIO(data)).to_pylist()


def _to_parquet(rows: Any, before: bytes) -> bytes:
    """Rows as a table; a column that no table can have becomes text."""
    rows = [row if isinstance(row, dict) else {"value": row} for row in rows] or [{"value": None}]
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[str(name).encode("utf-8", "replace").decode()] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            columns[str(name).encode("utf-8", "replace").decode()] = pa.array(
                [None if v is None else ascii(v) for v in values]
            )
    written = io.BytesIO()
    pq.write_table(pa.table(columns), written)
    return written.getvalue()


def _read_header(data: bytes) -> Any:
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {k: json.loads(v) for k, v in header["__metadata__"].items()}
    return {"header": header}


def _with_header(tree: Any, before: bytes) -> bytes:
    """Weights under another header; the tensors stay."""
    (size,) = struct.unpack("<Q", before[:8])
    header = tree.get("header") if isinstance(tree, dict) else tree
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        texts = {k: json.dumps(v) for k, v in header["__metadata__"].items()}
        header = {**header, "__metadata__": texts}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + before[8 + size :]


# Suffix -> (bytes to nested values, and with the bytes before back).
FORMATS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any, bytes], bytes]]] = {
    ".json": (json.loads, _to_json),
    ".jsonl": (lambda data: [json.loads(line) for line in data.splitlines()], _to_lines),
    ".yaml": (yaml.safe_load, _to_yaml),
    ".parquet": (_read_parquet, _to_parquet),
    ".safetensors": (_read_header, _with_header),
}


@st.composite
def changed_file(draw: Any, suffix: str, data: Data) -> Data:
    """A file whose values were changed where its format is known, or else its bytes."""
    if suffix not in FORMATS or draw(st.integers(0, 4)) == 0:
        return Data(draw(changed_bytes(data)))
    read, write = FORMATS[suffix]
    return Data(write(draw(changed_tree(read(data))), data))

"""Documents of tables: a column of csv, parquet or arrow files, batch by batch. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_fn.data.streams import Reading, kind
from llama_fn.errors import UserError

TABLES = {".csv", ".parquet", ".arrow", ".feather"}
BATCH_ROWS = 1024
CSV_BLOCK = 16 << 20  # a row must fit


def from_table(file: Path, reading: Reading) -> Iterator[str]:
    """The texts of the column that is named; rows without one are passed over. UserError where the column is not there
    or holds no texts, and where the file is damaged."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow: pip install 'llama_fn[data]'") from None
    column, *within = reading.key.split(".")
    try:
        with reading.opened(file) as stream:
            for batch in _batches(file, stream, column):
                if column not in batch.schema.names:
                    raise UserError(f"{file} has no column --data.jsonl_key={column}; it has {batch.schema.names[:12]}")
                for value in _raw(batch.column(column), within, file):
                    if (text := None if value is None else reading.text(value)) is not None:
                        yield text
    except (pyarrow.ArrowException, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file} cannot be read as {kind(file)}: {said}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: a text is not UTF-8 ({error.reason}); --errors=replace or skip goes on where preprocess reads it"
        ) from None


def has_column(file: Path, reading: Reading) -> bool:
    """Whether a csv file has the column; one that has not is text like any other."""
    with reading.opened(file) as stream:
        header = stream.readline(1 << 16).decode("utf-8", "replace").strip()
    reading.finished_bytes -= file.stat().st_size
    return reading.key.split(".")[0] in [name.strip().strip('"') for name in header.split(",")]


def _batches(file: Path, stream: Any, column: str) -> Iterator[Any]:
    import pyarrow as pa

    suffix = kind(file)
    if suffix == ".csv":
        from pyarrow import csv

        options = csv.ConvertOptions(
            include_columns=[column], column_types={column: pa.string()}, strings_can_be_null=False
        )
        parsing = csv.ParseOptions(newlines_in_values=True)
        yield from csv.open_csv(
            stream, read_options=csv.ReadOptions(block_size=CSV_BLOCK), parse_options=parsing, convert_options=options
        )
    elif suffix == ".parquet":
        from pyarrow import parquet

        held = parquet.ParquetFile(stream if stream.seekable() else pa.BufferReader(stream.read()))
        names = held.schema_arrow.names
        yield from held.iter_batches(BATCH_ROWS, columns=[column] if column in names else None)
    else:
        yield from _arrow(pa, stream)


def _arrow(pa: Any, stream: Any) -> Iterator[Any]:
    """Of the file format, or of the stream that Hugging Face's datasets write."""
    if stream.seekable() and stream.peek(6)[:6] == b"ARROW1":
        held = pa.ipc.open_file(stream)
        yield from (held.get_batch(i) for i in range(held.num_record_batches))
    else:
        yield from pa.ipc.open_stream(stream)


def _raw(values: Any, within: list[str], file: Path) -> Iterator[bytes | None]:
    """The texts of a column as they are in the file. Arrow trusts a file's offsets, and a damaged one ends the process
    when they are used: they are looked at before."""
    import pyarrow as pa
    from pyarrow import compute

    for name in within:
        if not pa.types.is_struct(values.type) or values.type.get_field_index(name) < 0:
            raise UserError(f"{file}: the column has no {name} within it; it holds {values.type}"[:300])
        values.validate(full=True)
        values = compute.struct_field(values, [name])
    if pa.types.is_dictionary(values.type):
        values.validate(full=True)
        values = values.dictionary_decode()
    if pa.types.is_null(values.type):
        return
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"{file}: the column holds {values.type}, and texts are expected"[:300])
    held = values.cast(pa.binary() if pa.types.is_string(values.type) else pa.large_binary(), safe=False)
    held.validate(full=True)
    yield from (value.as_py() for value in held)

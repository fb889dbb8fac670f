"""A run in DuckDB: views over exactly the files of its manifest, with the blobs decoded to lists.

File names, labels and the run's name are data: quoted wherever they come near SQL. Only `where` and `query` are SQL.
"""

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .columns import blob_type, check_size, column, docs_schema
from .layout import File
from .records import Records

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from .run import Run

# IEEE half precision from its 16 bits; the factor is 2**-24, the smallest subnormal.
_HALF = """
CASE WHEN (bits & 31744) = 31744 THEN CASE WHEN (bits & 1023) = 0 THEN 'inf'::FLOAT ELSE 'nan'::FLOAT END
     WHEN (bits & 31744) = 0 THEN (bits & 1023) * 5.960464477539063e-08::DOUBLE
     ELSE (1024 + (bits & 1023)) * power(2::DOUBLE, ((bits >> 10) & 31)::INTEGER - 25)
END::FLOAT * CASE WHEN bits >= 32768 THEN -1 ELSE 1 END::FLOAT
"""


class Database:
    """An in-memory DuckDB with views of a run."""

    def __init__(self, run: "Run") -> None:
        import duckdb
        import pyarrow as pa

        self._run = run
        self._connection = duckdb.connect(":memory:", config={"python_enable_replacements": False})
        known = run.gathered
        texts = {"text_hash": known.text_hash, **known.labels}
        documents = {name: pa.array(values.tolist(), pa.string()) for name, values in texts.items()}
        table = pa.table({"doc_id": known.doc_ids, "n_tokens": known.n_tokens, **documents})
        self._connection.register("gathered", table)
        self._connection.execute("CREATE TABLE documents AS FROM gathered")  # a table, for every cursor to see
        self._connection.unregister("gathered")
        for kind in run.record:
            self._connection.execute(f"CREATE MACRO decode_{kind}(blob) AS {_decoder(run, kind)}")
        self._view("parts", [segment.part for segment in run.segments], run.part_schema())
        self._view("docs", [segment.docs for segment in run.segments], docs_schema(known.labels))
        self._connection.execute(f"CREATE VIEW tokens AS {self._select(run.layers)}")
        self._connection.execute(
            f"""CREATE VIEW counts AS
            SELECT doc_id, {run.layers}[1 + (i - 1) // {run.num_experts}] AS layer,
                   (i - 1) % {run.num_experts} AS expert, sum(picks)::BIGINT AS picks
            FROM (SELECT doc_id, unnest(counts) AS picks, generate_subscripts(counts, 1) AS i FROM docs)
            GROUP BY ALL"""
        )

    def sql(self, query: str) -> "duckdb.DuckDBPyRelation":
        """The relation of a query."""
        return self._connection.sql(query)

    def tokens(self, layer: int | None, where: str | None) -> "duckdb.DuckDBPyRelation":
        """The relation of `Run.tokens`; `layer` was checked."""
        source = "tokens" if layer is None else f"({self._select([layer])})"
        condition = "" if where is None else f"JOIN documents USING (doc_id) WHERE ({where}\n)"
        return self._connection.sql(f"SELECT t.* FROM {source} AS t {condition}")

    def rows(self, records: Records, where: str) -> NDArray[np.int64]:
        """Which of `records` a condition over tokens and documents selects, ascending."""
        import pyarrow as pa

        flat = {"doc_id": records.doc, "pos": records.pos, "token_id": records.token, "phase": records.phase}
        cursor = self._connection.cursor()
        cursor.register("batch", pa.table({"batch_row": np.arange(len(records)), **flat}))
        found = cursor.execute(
            f"SELECT batch_row FROM batch JOIN documents USING (doc_id) WHERE ({where}\n) ORDER BY batch_row"
        )
        rows: NDArray[np.int64] = found.fetchnumpy()["batch_row"]
        cursor.unregister("batch")
        return rows

    def documents(self, where: str) -> NDArray[np.int64]:
        """Ids of the documents that a condition over `documents` selects, ascending."""
        found = self._connection.cursor().execute(f"SELECT doc_id FROM documents WHERE ({where}\n) ORDER BY doc_id")
        ids: NDArray[np.int64] = found.fetchnumpy()["doc_id"]
        return ids

    def _view(self, name: str, files: list[File], schema: "pa.Schema") -> None:
        """A view over Parquet files of the manifest, or over an empty table if it lists none."""
        if not files:
            self._connection.register(name, schema.empty_table())
            return
        paths = [str(check_size(self._run.path.resolve(), file)) for file in files]
        # DuckDB reads a file name as a pattern: in brackets, its special characters stand for themselves.
        names = [quoted(re.sub(r"[\[*?]", r"[\g<0>]", path)) for path in paths]
        # A directory named "task=dna" would become a column; label columns may differ between docs files.
        options = f"hive_partitioning = false, union_by_name = {str(name == 'docs').lower()}"
        self._connection.execute(f"CREATE VIEW {name} AS FROM read_parquet([{', '.join(names)}], {options})")

    def _select(self, layers: list[int]) -> str:
        """One row per token and layer; the decoding stands outside of the union, which is planned 30 times faster."""
        flat = "doc_id, pos, token_id, phase"
        scans = []
        for layer in layers:
            blobs = [f"{column(kind, layer)} AS {kind}" for kind in self._run.record]
            scans.append(f"SELECT {', '.join([flat, f'{layer} AS layer', *blobs])} FROM parts")
        decoded = [f"decode_{kind}({kind}) AS {kind}" for kind in self._run.record]
        return f"SELECT {', '.join([flat, 'layer', *decoded])} FROM ({' UNION ALL '.join(scans)})"


def quoted(text: str) -> str:
    """`text` as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def _decoder(run: "Run", kind: str) -> str:
    """SQL from a blob to its list of numbers: shifts of 8-byte words, six times as fast as slices of one byte."""
    dtype, values = blob_type(kind, run.num_experts, run.top_k)
    size, total = dtype.itemsize, dtype.itemsize * values
    numbers = []
    for first in range(0, total, size):
        octets = []
        for place, octet in enumerate(range(first, first + size)):
            start, stop = octet // 8 * 8, min(octet // 8 * 8 + 8, total)
            shift = 8 * (stop - 1 - octet)  # the cast takes the first octet for the highest
            octets.append(f"((blob[{start + 1}:{stop}]::BIT::UBIGINT >> {shift}) & 255) << {8 * place}")
        numbers.append(" | ".join(f"({octet})" for octet in octets))
    if kind == "ids":
        return "[" + ", ".join(f"({number})::{'UTINYINT' if size == 1 else 'USMALLINT'}" for number in numbers) + "]"
    return f"list_transform([{', '.join(numbers)}], lambda bits: ({_HALF})::FLOAT)"

"""Files of embeddings: their metadata and columns, their formats, and embeddings in memory.

`metadata` says which encoder made embeddings and holds the one space check. `schema` has the columns. `base` is the
protocol of a format, which `parquet`, `shards`, `npy` and `lance` implement and `formats` lists: names are told apart
there and nowhere else. `earlier` is the output of a job that a later one extends. `table` is embeddings in memory;
`arrays` and `foreign` turn Python values and tables of other programs into them, and `foreign_files` reads the files of
such programs. `parquet_file` bounds what a Parquet file may take in memory, `npy_write` commits the three files of an
array, and `side_files` names the files beside an output.
"""

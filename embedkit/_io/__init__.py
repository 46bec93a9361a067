"""Private building blocks, each of them once.

Files: `atomic` (atomic writes), `locks`, `reading` (bounded reads), `outputs` (check outputs against inputs),
`ownership` (folders that other users can write to). Formats: `json`, `columns` (Parquet), `npz`. Messages: `text`, and
`optional` for packages that are not installed.
"""

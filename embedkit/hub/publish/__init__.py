"""Publishing.

`publish` takes an entry to a `folder`, a `bucket` or the Hub (`hf`), after `fitness` checked its facts. `index` makes
`index.json`; `pages`, with `plot`, the pages that people read.
"""

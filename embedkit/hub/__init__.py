"""Zoos: where entries come from and where they are published.

Names: `urls` (parse paths and URLs), `resolve` (name -> verified entry, in look-up order), `listing` (which names there
are), `lockfile` (pins), `catalog` (`index.json`), `open` (URL -> zoo). Kinds of zoo: `folder` (and the package's own),
`static` (a web site, a bucket or an archive), `hf` (the Hugging Face Hub), each behind `cached`; `base` holds the
protocols that they follow. Downloads: `download` (resumable, hashed), `cache`, `limits` (what may be downloaded),
`verified` (bytes checked against the manifest), `access` (credentials, offline), `signing`. Writing: `publish` and
`mirror`. Lists of entries: `bulk`, `bundle` (one tar), `leaderboard` (metrics by data set).
"""

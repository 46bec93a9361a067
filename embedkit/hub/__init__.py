"""Where entries come from and go to.

`place` says what a place is and verifies what comes from it; `address` takes names and URLs apart; `access` opens
places. Kinds of place: `folder` (and the package), `site` over `web`, `buckets` or `archive`, `huggingface`. What is
remote comes through `download` into the `cache`, under `filelist`'s rules, and is pinned by `lockfile`. The other
way: `publish` (`folderstore`, `bucketstore`, `hubcommits`) and `mirror`, for entries that pass `fitness`; `index` and
`pages` are what they are listed in. `pull` acts on lists of entries. What strangers say passes through `messages` on
its way to a terminal and through `markdown` on its way to a page.
"""

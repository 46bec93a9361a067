"""From the name of an image to its pixels.

`sources` lists images (with `patterns`, and the containers of `archives` and `tables`), `ids` names them, and
`originals` finds them again. `decode` turns bytes into an upright image (with what `jpeg`, `png`, `tiff`, `samples`
and `icc` know of their formats), and `transform` turns that into the pixels of a preprocess contract. `files` bounds
reads; `memory` bounds what workers hold at once.
"""

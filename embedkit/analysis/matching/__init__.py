"""Decisions whether embeddings show one identity, with measured error rates.

`pairs` reads and samples labeled pairs, `rates` holds the statistics, `calibrate` makes a calibration of both, and
`calibration` is what it decides and its file. `identification` decides against a gallery.
"""

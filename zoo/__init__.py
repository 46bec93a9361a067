"""The zoo: one folder of data per entry, `index.json` over them, and no code.

The wheel carries the index and the default entry; a checkout's folder is a zoo like any other.
"""

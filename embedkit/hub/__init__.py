"""Where entries come from: one small protocol (`place`), and a module for each kind of place."""

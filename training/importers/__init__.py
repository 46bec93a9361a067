"""Importers: foreign checkpoints -> zoo entries.

`embedkit import` takes whatever `layouts` describes and what timm builds; what needs code of its own has a file of its
own. Such an importer names its source by package, version and sha256, maps tensors to timm's names, checks every
shape (none missing, none left over), and gives the network to `embedkit.training.export.write_entry`. Its test runs
the original code beside it: a wrong twin, such as another padding, loads without complaint and looks plausible.
"""

"""What needs pictures and an encoder both: faces in photographs, and whether two pictures show one identity.

Stands above `embedkit.analysis` and the encoder; neither imports this.
"""

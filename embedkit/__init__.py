"""embedkit: image embeddings from pictures, without PyTorch."""

__version__ = "0.1.0"

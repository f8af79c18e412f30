"""I2V-Adapter in plain PyTorch: a picture and a prompt become a video (arXiv 2312.16693)."""

__version__ = "0.1.0"

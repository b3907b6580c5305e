"""nbdclone: linked clones of disk images, served over NBD."""

__version__ = "0.1.0"

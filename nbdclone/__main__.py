"""``python -m nbdclone``."""

from nbdclone.cli import main

main()

"""The programs that people use with NBD, each over a real socket, against `nbdclone serve`."""

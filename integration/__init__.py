"""Tests that drive nbdclone with programs that others wrote: the Linux kernel, qemu, libnbd, fio."""

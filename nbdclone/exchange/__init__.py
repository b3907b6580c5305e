"""Images of other programs, through qemu's: each side has the other's disks over NBD, so nothing is copied twice.

export.py    from a base or clone to an image file
overlay.py   from a clone to a qcow2 overlay over its base's image
adopt.py     from a qcow2 overlay to a clone
programs.py  a disk of ours served for one of qemu's programs; one of theirs served for us
"""

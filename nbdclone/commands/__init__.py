"""The verbs of the command line: one module for each group of them, which registers its verbs on the program."""

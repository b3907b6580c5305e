"""What is done to a pool from outside: the verbs, the API of a running server, and its client. docs/control.md."""

"""Linux guests: small virtual machines in which a real kernel is the client of the server under test."""

"""What survives every crash: the ledger and the repository."""

"""Steps between the schemas of the ledger, for alembic. How to add one: docs/decisions/0024."""

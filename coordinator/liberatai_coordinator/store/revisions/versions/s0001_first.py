"""The first schema: nothing comes before it."""

revision = "1"
down_revision = None


def upgrade() -> None:
    """Do nothing: every ledger without a number of its own is made whole, by `migration.create`."""

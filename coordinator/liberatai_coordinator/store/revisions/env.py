"""What alembic runs: the steps up to the newest schema, in the transaction that `migration.upgrade` began."""

from alembic import context

from liberatai_coordinator.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()

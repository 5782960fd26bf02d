"""A fleet that is not there: agents in virtual time, in child processes or in containers."""

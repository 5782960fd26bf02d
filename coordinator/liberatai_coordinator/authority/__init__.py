"""The fleet's certificate authority, and the broker's files that follow from it."""

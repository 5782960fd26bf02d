"""Who is there and who gets what: pure decisions."""

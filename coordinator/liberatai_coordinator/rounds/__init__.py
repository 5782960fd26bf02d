"""One round: who is asked, what is refused, when it closes; pure decisions."""

"""What devices say: checked, decided, stored, answered."""

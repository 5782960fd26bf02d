"""One job from its plan to its last version."""

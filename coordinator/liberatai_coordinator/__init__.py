"""The coordinator: assigns, collects, aggregates and republishes."""

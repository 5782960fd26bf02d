"""One file per command of `liberatai-agent`: its parser and what it does."""

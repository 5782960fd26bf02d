"""One file per claim; each prints one JSON object on its last line."""

"""Routes of the API, a file per noun; every route is one call of `Operations`."""

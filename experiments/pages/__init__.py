"""Pages: what runs and studies look like in a browser, each one file without anything from outside it."""

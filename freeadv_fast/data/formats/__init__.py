"""Which picture files are read, and how large they are: a kind of file a module."""

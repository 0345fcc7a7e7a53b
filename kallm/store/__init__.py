"""Where everything lives: a folder or an S3 bucket behind one interface, and the commit protocol."""

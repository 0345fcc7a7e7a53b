"""One cell, and a whole study on this machine."""

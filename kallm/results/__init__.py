"""Records, status, statistics and the table."""

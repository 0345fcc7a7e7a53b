"""Records, status, statistics, the table and the report."""

"""Studies, variants and the plan of cells."""

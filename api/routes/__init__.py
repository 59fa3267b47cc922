"""HTTP in, HTTP out: one file for each family of addresses."""

"""What stands around the rules: their files, their options, and the two ways (Snakemake, DVC) to run them."""

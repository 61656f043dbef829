"""Block by block: a student's ranges, statistics and weights, from its teacher and a few images without labels."""

"""What serves the comparison with papers, and is off by default."""

"""What a person reads: tables, plots, the HTML report, and the record that they are made of."""

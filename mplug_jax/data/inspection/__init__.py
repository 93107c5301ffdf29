"""What is in data sources: counts, lengths, overlaps, failures and samples, as text and HTML."""

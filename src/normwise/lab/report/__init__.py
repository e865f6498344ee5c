"""The report: one HTML page that needs no network, and its figures as files."""

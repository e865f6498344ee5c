"""The paper, reproduced: data, models, runs, claims and the report."""

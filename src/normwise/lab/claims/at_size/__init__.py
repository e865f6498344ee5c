"""Claims on networks of the paper's size, in the budgets "large" and "paper"; they join as the others do."""

"""The paper's experiments: nine methods, six data sets, four budgets."""

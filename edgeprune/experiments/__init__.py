"""Scripts that write a page of docs/: full_size, evidence, estimators, modulation."""

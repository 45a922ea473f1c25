"""Scripts that measure and write pages of docs/: full_size, evidence, estimators and modulation."""

"""The checks, by what they need. Packages are imported in the functions: one that is missing leaves out its checks."""

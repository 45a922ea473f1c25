"""The built-in model: shapes world, its trained teacher, and how that was trained."""

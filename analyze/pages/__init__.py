"""What people look at: the report and the feature browser."""

"""What a study looks like: the report and the pictures of what KAN layers learned."""

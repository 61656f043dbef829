"""From a folder or a repository to a student, and back."""

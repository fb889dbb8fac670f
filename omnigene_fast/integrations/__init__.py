"""Where the operators meet other libraries' models."""

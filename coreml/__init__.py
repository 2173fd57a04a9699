"""Core ML out."""

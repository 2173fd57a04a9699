"""Core ML out: packages for the Neural Engine, and what can be proved about them on any machine."""

"""Starting SGLang servers on this machine and sending them HTTP requests."""

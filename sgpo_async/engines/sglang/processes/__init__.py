"""Starting SGLang servers on this machine and talking to them by HTTP."""

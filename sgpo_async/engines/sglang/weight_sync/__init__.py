"""How a weight version reaches SGLang servers, and how its arrival is verified."""

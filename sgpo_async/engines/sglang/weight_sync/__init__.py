"""How a version of the weights reaches SGLang servers, and how its arrival is proved."""

"""A Hugging Face model: its folder, tokenizer, weights and export.

folder        which folder `model.path` means; the tokenizer and its fingerprint
load          the model itself, with errors that say what is wrong
parameters    replace a model's parameters in place and prove that they arrived
export        the trained policy as a Hugging Face folder
"""

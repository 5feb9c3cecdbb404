"""A Hugging Face model: its folder, tokenizer, weights and export.

folder        find the folder of `model.path`; load the tokenizer and compute its fingerprint
load          load the model, with errors that say what is wrong
parameters    replace a model's parameters in place and verify the result
export        write the trained policy as a Hugging Face folder
"""

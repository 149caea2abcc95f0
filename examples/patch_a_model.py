"""Patch a model, generate the same tokens, see what drafting came to, unpatch."""

import torch
from given import model_and_questions

import std_decode

model, tokenizer, inputs, _ = model_and_questions()
plain = model.generate(**inputs, max_new_tokens=64, do_sample=False)

# By default each round drafts as many tokens as pay, or none; here always four.
std_decode.patch(model, draft_length=4, top_k_keys=64)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(std_decode.last_stats(model))
std_decode.unpatch(model)

print("the same tokens:", torch.equal(plain, output))

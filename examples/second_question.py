"""Ask again about the same video without reading it again.

The cache of the first call is cut back to the end of the video. Text after it is read anew, so
that its positions are those of a prompt of its own.
"""

import torch
from given import model_and_questions

import std_decode

model, tokenizer, first, second = model_and_questions()
std_decode.patch(model, draft_length=4, top_k_keys=64)


def tell(inputs, **more):
    output = model.generate(
        **inputs, **more, max_new_tokens=64, do_sample=False, return_dict_in_generate=True
    )
    told = output.sequences[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(told, skip_special_tokens=True))
    return output, told


output, _ = tell(first)
cache = output.past_key_values
visual = torch.tensor([model.config.video_token_id, model.config.image_token_id])
video_ends = int(torch.isin(first["input_ids"][0].cpu(), visual).nonzero().max()) + 1
cache.crop(video_ends - cache.get_seq_length())  # a negative number: so many are removed

# Pixels are for tokens that are still to be read.
again = {name: value for name, value in second.items() if not name.startswith("pixel_values")}
_, told = tell(again, past_key_values=cache)
stats = std_decode.last_stats(model)
print(f"{stats.reused_tokens} of {stats.prompt_tokens} tokens were read before")

std_decode.unpatch(model)
alone = model.generate(**second, max_new_tokens=64, do_sample=False)
print("as when asked alone:", torch.equal(alone[0, second["input_ids"].shape[1] :], told))

"""One generation with llama.cpp, for comparison: prompt and decode speed as JSON.

    llama_peer.py MODEL PROMPT_FILE PROMPT_TOKENS DECODE_TOKENS THREADS BATCH
"""

import json
import sys
import time

from llama_cpp import Llama


def main():
    model, text_file = sys.argv[1:3]
    prompt_tokens, decode_tokens, threads, batch = map(int, sys.argv[3:7])
    llama = Llama(model_path=model, n_ctx=prompt_tokens + decode_tokens + 8, n_threads=threads,
                  n_threads_batch=threads, n_batch=batch, n_ubatch=batch, verbose=False)
    with open(text_file, encoding="utf-8") as stream:
        ids = llama.tokenize(stream.read().encode(), add_bos=False)[:prompt_tokens]
    began = time.monotonic()
    llama.eval(ids)
    token = llama.sample(temp=0.0)
    prompt_s = time.monotonic() - began
    began = time.monotonic()
    for _ in range(decode_tokens):
        llama.eval([token])
        token = llama.sample(temp=0.0)
    decode_s = time.monotonic() - began
    print(json.dumps({"prompt_tokens_per_s": len(ids) / prompt_s,
                      "decode_tokens_per_s": decode_tokens / decode_s}))


if __name__ == "__main__":
    main()
